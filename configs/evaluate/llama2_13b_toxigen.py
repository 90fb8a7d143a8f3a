"""ToxiGen on Llama-2 13B, proxy-tuned with the 7B chat model (Liu et al. 2024, section 3).

Whether a text is toxic is for a classifier to say (decode/tasks/judges.py); without one the texts
are kept and unjudged.

python -m decode.evaluate --config=configs/evaluate/llama2_13b_toxigen.py
"""

from configs import llama2_13b_chat
from configs.evaluate.defaults import evaluation


def get_config():
    config = evaluation(llama2_13b_chat.get_config(), "toxigen")
    config.expert.template = "task"
    config.tuned.path = "meta-llama/Llama-2-13b-chat-hf"
    config.tuned.template = "task"
    config.batch_size = 32
    config.output_dir = "runs/evaluate/llama2_13b_toxigen"
    return config
