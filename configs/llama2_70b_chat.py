"""Llama-2 70B, proxy-tuned to instructions with the 7B chat model (Liu et al. 2024)."""

from configs import llama2_13b_chat


def get_config():
    config = llama2_13b_chat.get_config()
    config.base.path = "meta-llama/Llama-2-70b-hf"
    config.mesh.tensor = 8  # its 8 kv heads
    config.mesh.fsdp = -1  # devices beyond 8 split the model width
    return config
