"""M- of the quickstart, from random weights: two layers, 0.4 M parameters.

--config=configs/quickstart/pretrain_small.py:1    on the world of seed 1; so in all of them
"""

from ml_collections import ConfigDict

from configs.train.defaults import sft


def get_config(seed="0"):
    home = f"runs/quickstart/{seed}"
    config = sft()
    config.architecture = ConfigDict(
        {
            "model_type": "llama",
            "vocab_size": 1536,
            "hidden_size": 96,
            "intermediate_size": 320,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        }
    )
    config.tokenizer = f"{home}/world/tokenizer"
    config.data.path = f"{home}/world/corpus.jsonl"
    config.data.format = "text"
    config.max_length = 256
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.b2 = 0.98
    config.epochs = 1
    config.batch_size = 2
    config.compute_dtype = "float32"
    config.seed = int(seed)
    config.log_every = 10
    config.checkpoint_every = 500
    config.keep = 1
    config.output_dir = f"{home}/small"
    config.export_dtype = "float32"
    return config
