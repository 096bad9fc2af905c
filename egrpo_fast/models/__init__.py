"""Model families and their weights on disk; the trainer sees `encode`, `velocity` and `decode`."""
