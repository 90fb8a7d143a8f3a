"""A GSM8K expert from Qwen2.5-Coder-0.5B by LoRA, sized for a laptop: the first thousand rows.

python -m train.convert gsm8k train.jsonl gsm8k_train.jsonl
python -m train.sft --config=configs/train/qwen_gguf_gsm.py --config.data.path=gsm8k_train.jsonl
"""

from configs.train.defaults import sft


def get_config():
    config = sft()
    config.base = "~/.cache/proxy_jax/models/qwen2.5-coder-0.5b-instruct.gguf"
    config.data.limit = 1064
    config.held_out = 64
    config.max_length = 512
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 2e-4
    config.epochs = 1
    config.batch_size = 4
    config.compute_dtype = "float32"
    config.checkpoint_every = 10
    config.output_dir = "runs/qwen_gguf_gsm"
    return config
