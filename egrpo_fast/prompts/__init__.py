"""Prompts: their files, their order, their embeddings."""
