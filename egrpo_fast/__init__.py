"""E-GRPO for flow models: entropy-guided group relative policy optimisation, fast and exact (arXiv 2601.00423)."""

__version__ = "0.1.0"
