"""Named recipes: YAML trees of `egrpo_fast.config.Config`."""
