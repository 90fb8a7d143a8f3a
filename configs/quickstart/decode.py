"""The trio of the quickstart on fifty held-out questions, recorded token by token."""

from configs.defaults import decoding


def get_config(seed="0"):
    home = f"runs/quickstart/{seed}"
    config = decoding()
    for role, run in (("base", "large"), ("expert", "expert"), ("antiexpert", "small")):
        config[role].path = f"{home}/{run}/expert"
        config[role].dtype = "float32"
    config.plan = "stacked"
    config.prompts.path = f"{home}/world/held_out.jsonl"
    config.prompts.limit = 50
    config.max_new_tokens = 20
    config.batch_size = 64
    config.trace = True
    config.output_dir = f"{home}/tokens"
    return config
