"""Llama-2 13B, proxy-tuned to code with Code Llama 7B Python (Liu et al. 2024).

Sampling, stop strings and bans are those of the published HumanEval runs.
"""

from configs.defaults import decoding


def get_config():
    config = decoding()
    config.base.path = "meta-llama/Llama-2-13b-hf"
    config.expert.path = "codellama/CodeLlama-7b-Python-hf"
    config.antiexpert.path = "meta-llama/Llama-2-7b-hf"
    config.sampling.temperature = 0.8
    config.sampling.top_p = 0.95
    config.samples = 20
    config.max_new_tokens = 512
    config.stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    config.banned_tokens = ("pass", "...")
    return config
