"""The GSM8K expert of Liu et al. 2024: Llama-2 7B, all parameters.

python -m train.convert gsm8k train.jsonl gsm8k_train.jsonl
"""

from configs.train.defaults import sft


def get_config():
    config = sft()
    config.base = "meta-llama/Llama-2-7b-hf"
    config.data.path = "gsm8k_train.jsonl"
    config.packing = False
    config.epochs = 2
    config.batch_size = 128
    config.accumulate = 16
    config.remat = "full"
    config.mesh.fsdp = -1
    config.output_dir = "runs/llama2_7b_gsm"
    return config
