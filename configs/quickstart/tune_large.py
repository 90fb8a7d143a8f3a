"""The ceiling of the quickstart: M, tuned directly on the questions that M+ is tuned on."""

from configs.quickstart import tune_small


def get_config(seed="0"):
    config = tune_small.get_config(seed)
    config.base = f"runs/quickstart/{seed}/large/expert"
    config.output_dir = f"runs/quickstart/{seed}/ceiling"
    return config
