"""One decoder for every family, steered by a ModelConfig."""
