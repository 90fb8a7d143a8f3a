"""SmolLM2 1.7B, instruction-tuned by proxy with the 360M pair. Open weights, fits a laptop."""

from configs.defaults import decoding


def get_config():
    config = decoding()
    config.base.path = "HuggingFaceTB/SmolLM2-1.7B"
    config.expert.path = "HuggingFaceTB/SmolLM2-360M-Instruct"
    config.expert.template = "chat"
    config.antiexpert.path = "HuggingFaceTB/SmolLM2-360M"
    config.plan = "stacked"
    return config
