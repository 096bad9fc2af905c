"""Qwen-Image 2.1, by diffusers."""
