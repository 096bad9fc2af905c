"""FLUX.1, by diffusers."""
