"""HumanEval on Llama-2 70B, proxy-tuned with Code Llama 7B Python; see llama2_13b_humaneval.

python -m decode.evaluate --config=configs/evaluate/llama2_70b_humaneval.py
"""

from configs.evaluate import llama2_13b_humaneval


def get_config():
    config = llama2_13b_humaneval.get_config()
    config.base.path = "meta-llama/Llama-2-70b-hf"
    config.tuned.path = "codellama/CodeLlama-70b-Python-hf"
    config.mesh.tensor = 8  # its 8 kv heads
    config.mesh.fsdp = -1  # devices beyond 8 split the model width
    config.output_dir = "runs/evaluate/llama2_70b_humaneval"
    return config
