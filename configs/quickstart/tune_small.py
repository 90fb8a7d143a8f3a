"""M+ of the quickstart: M-, tuned to answer on a few hundred questions."""

from configs.train.defaults import sft


def get_config(seed="0"):
    home = f"runs/quickstart/{seed}"
    config = sft()
    config.base = f"{home}/small/expert"
    config.data.path = f"{home}/world/tuning.jsonl"
    config.max_length = 64
    config.packing = False
    config.optimizer.learning_rate = 3e-4
    config.epochs = 4
    config.batch_size = 16
    config.compute_dtype = "float32"
    config.seed = int(seed)
    config.output_dir = f"{home}/expert"
    config.export_dtype = "float32"
    return config
