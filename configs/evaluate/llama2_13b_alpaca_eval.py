"""AlpacaFarm's instructions on Llama-2 13B, proxy-tuned with the 7B chat model (Liu et al. 2024).

Win rates need a judge (decode/tasks/judges.py); without one the texts are kept and
unjudged.

python -m decode.evaluate --config=configs/evaluate/llama2_13b_alpaca_eval.py
"""

from configs import llama2_13b_chat
from configs.evaluate.defaults import evaluation


def get_config():
    config = evaluation(llama2_13b_chat.get_config(), "alpaca_eval")
    config.expert.template = "task"
    config.tuned.path = "meta-llama/Llama-2-13b-chat-hf"
    config.tuned.template = "task"
    config.output_dir = "runs/evaluate/llama2_13b_alpaca_eval"
    return config
