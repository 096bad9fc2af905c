"""FLUX.2, by diffusers."""
