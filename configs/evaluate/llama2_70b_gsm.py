"""GSM8K on Llama-2 70B, proxy-tuned with the 7B chat model; see llama2_13b_gsm.

python -m decode.evaluate --config=configs/evaluate/llama2_70b_gsm.py
"""

from configs.evaluate import llama2_13b_gsm


def get_config():
    config = llama2_13b_gsm.get_config()
    config.base.path = "meta-llama/Llama-2-70b-hf"
    config.tuned.path = "meta-llama/Llama-2-70b-chat-hf"
    config.mesh.tensor = 8  # its 8 kv heads
    config.mesh.fsdp = -1  # devices beyond 8 split the model width
    config.output_dir = "runs/evaluate/llama2_70b_gsm"
    return config
