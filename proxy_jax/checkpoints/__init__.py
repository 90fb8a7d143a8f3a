"""Weights on disk: Hugging Face directories and GGUF files."""
