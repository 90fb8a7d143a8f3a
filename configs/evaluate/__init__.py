"""What to evaluate: one file an experiment."""
