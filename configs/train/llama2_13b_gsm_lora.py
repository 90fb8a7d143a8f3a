"""The LoRA baseline of Liu et al. 2024 on GSM8K: Llama-2 13B, rank 64, its higher learning rate."""

from configs.train import llama2_7b_gsm


def get_config():
    config = llama2_7b_gsm.get_config()
    config.base = "meta-llama/Llama-2-13b-hf"
    config.lora.rank = 64
    config.lora.alpha = 16.0
    config.lora.dropout = 0.1
    config.optimizer.learning_rate = 1e-4
    config.output_dir = "runs/llama2_13b_gsm_lora"
    return config
