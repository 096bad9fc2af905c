"""Backbones: one file per model family; the rest of the project sees `encode`, `velocity` and `decode`."""
