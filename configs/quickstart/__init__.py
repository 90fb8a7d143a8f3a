"""The family of quickstart.py: two models from scratch, and their tuning."""
