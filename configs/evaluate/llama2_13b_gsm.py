"""GSM8K on Llama-2 13B, proxy-tuned with the 7B chat model (Liu et al. 2024, section 3).

python -m decode.evaluate --config=configs/evaluate/llama2_13b_gsm.py
"""

from configs import llama2_13b_chat
from configs.evaluate.defaults import evaluation


def get_config():
    config = evaluation(llama2_13b_chat.get_config(), "gsm")
    config.expert.template = "task"
    config.tuned.path = "meta-llama/Llama-2-13b-chat-hf"
    config.tuned.template = "task"
    config.batch_size = 32
    config.output_dir = "runs/evaluate/llama2_13b_gsm"
    return config
