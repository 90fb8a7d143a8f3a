"""DS-1000 on Llama-2 13B, proxy-tuned with Code Llama 7B Python (Liu et al. 2024, section 4).

The libraries that its problems are about must be installed: pandas, matplotlib, tensorflow, scipy,
scikit-learn, torch.

python -m decode.evaluate --config=configs/evaluate/llama2_13b_ds1000.py
"""

from configs import llama2_13b_code
from configs.evaluate.defaults import evaluation


def get_config():
    config = evaluation(llama2_13b_code.get_config(), "ds1000")
    config.tuned.path = "codellama/CodeLlama-13b-Python-hf"
    config.output_dir = "runs/evaluate/llama2_13b_ds1000"
    return config
