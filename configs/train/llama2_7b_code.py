"""A code expert: Llama-2 7B goes on learning from source files, {"text": ...} a line.

The paper takes Code Llama 7B Python ready-made (configs/llama2_13b_code.py).
With LoRA: --config.lora.rank=64 --config.lora.dropout=0.1 --config.optimizer.learning_rate=1e-4
"""

from configs.train import llama2_7b_gsm


def get_config():
    config = llama2_7b_gsm.get_config()
    config.data.path = "code.jsonl"
    config.data.format = "text"
    config.packing = True
    config.epochs = 1
    config.optimizer.schedule = "cosine"
    config.checkpoint_every = 500
    config.output_dir = "runs/llama2_7b_code"
    return config
