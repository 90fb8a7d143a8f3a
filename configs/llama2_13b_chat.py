"""Llama-2 13B, proxy-tuned to instructions with the 7B chat model (Liu et al. 2024)."""

from configs.defaults import decoding


def get_config():
    config = decoding()
    config.base.path = "meta-llama/Llama-2-13b-hf"
    config.expert.path = "meta-llama/Llama-2-7b-chat-hf"
    config.expert.template = "reference"
    config.antiexpert.path = "meta-llama/Llama-2-7b-hf"
    config.max_new_tokens = 512
    return config
