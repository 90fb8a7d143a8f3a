"""Llama-2 70B, proxy-tuned to one task with your own 7B expert (Liu et al. 2024).

--config.expert.path=DIR    the fine-tuned Llama-2 7B, a Hugging Face directory
"""

from configs import llama2_13b_task


def get_config():
    config = llama2_13b_task.get_config()
    config.base.path = "meta-llama/Llama-2-70b-hf"
    config.mesh.tensor = 8  # its 8 kv heads
    config.mesh.fsdp = -1  # devices beyond 8 split the model width
    return config
