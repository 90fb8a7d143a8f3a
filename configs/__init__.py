"""What to run: one file an experiment."""
