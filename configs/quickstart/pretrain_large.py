"""M of the quickstart: ten times as large as M-, on the same pages."""

from configs.quickstart import pretrain_small


def get_config(seed="0"):
    config = pretrain_small.get_config(seed)
    config.architecture.hidden_size = 256
    config.architecture.intermediate_size = 768
    config.architecture.num_hidden_layers = 4
    config.architecture.num_attention_heads = 8
    config.architecture.num_key_value_heads = 8
    config.optimizer.learning_rate = 1.5e-3
    config.output_dir = f"runs/quickstart/{seed}/large"
    return config
