"""The two Qwen2.5-Coder GGUF files of tests/real/models.py; the "expert" is only prompted as one.

python -m tests.real.models     # assembles the files in ~/.cache/proxy_jax/models
"""

from configs.defaults import decoding

_MODELS = "~/.cache/proxy_jax/models"


def get_config():
    config = decoding()
    config.base.path = f"{_MODELS}/qwen2.5-coder-1.5b-instruct.gguf"
    config.expert.path = f"{_MODELS}/qwen2.5-coder-0.5b-instruct.gguf"
    config.expert.template = "[INST] {prompt} [/INST]"
    config.antiexpert.path = f"{_MODELS}/qwen2.5-coder-0.5b-instruct.gguf"
    config.plan = "shared"  # M+ and M- differ only by their prompts
    for role in ("base", "expert", "antiexpert"):
        config[role].dtype = "float32"
    return config
