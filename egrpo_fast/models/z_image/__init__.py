"""Z-Image, by diffusers."""
