"""A run's folder and all that is written there: settings, metrics, plots, the trained pipeline."""
