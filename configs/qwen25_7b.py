"""Qwen2.5 7B, instruction-tuned by proxy with the 0.5B pair. Open weights, fits one GPU."""

from configs.defaults import decoding


def get_config():
    config = decoding()
    config.base.path = "Qwen/Qwen2.5-7B"
    config.expert.path = "Qwen/Qwen2.5-0.5B-Instruct"
    config.expert.template = "chat"
    config.antiexpert.path = "Qwen/Qwen2.5-0.5B"
    config.plan = "stacked"
    return config
