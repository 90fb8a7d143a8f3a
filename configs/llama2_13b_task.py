"""Llama-2 13B, proxy-tuned to one task with your own 7B expert (Liu et al. 2024).

--config.expert.path=DIR    the fine-tuned Llama-2 7B, a Hugging Face directory
"""

from configs.defaults import decoding


def get_config():
    config = decoding()
    config.base.path = "meta-llama/Llama-2-13b-hf"
    config.expert.path = "experts/llama2-7b-task"
    config.antiexpert.path = "meta-llama/Llama-2-7b-hf"
    config.plan = "stacked"  # a full fine-tune has its base's shape
    config.max_new_tokens = 512
    return config
