"""Qwen-Image, by diffusers."""
