"""Training recipes: one file an expert."""
