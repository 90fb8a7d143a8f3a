"""HumanEval on Llama-2 13B, proxy-tuned with Code Llama 7B Python (Liu et al. 2024, section 4).

python -m decode.evaluate --config=configs/evaluate/llama2_13b_humaneval.py
"""

from configs import llama2_13b_code
from configs.evaluate.defaults import evaluation


def get_config():
    config = evaluation(llama2_13b_code.get_config(), "humaneval")
    config.tuned.path = "codellama/CodeLlama-13b-Python-hf"
    config.batch_size = 32
    config.output_dir = "runs/evaluate/llama2_13b_humaneval"
    return config
