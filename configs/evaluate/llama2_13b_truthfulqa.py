"""TruthfulQA on Llama-2 13B, proxy-tuned with the 7B chat model (Liu et al. 2024, section 3).

Multiple choice and open-ended, with the paper's sweep over alpha. Open answers need a judge of
truth and of informativeness (decode/tasks/judges.py); without one they are kept and unjudged.

python -m decode.evaluate --config=configs/evaluate/llama2_13b_truthfulqa.py
"""

from configs import llama2_13b_chat
from configs.evaluate.defaults import evaluation


def get_config():
    config = evaluation(llama2_13b_chat.get_config(), "truthfulqa_mc", "truthfulqa_open")
    config.expert.template = "task"
    config.tuned.path = "meta-llama/Llama-2-13b-chat-hf"
    config.tuned.template = "task"
    config.sweep.alphas = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    config.batch_size = 32
    config.output_dir = "runs/evaluate/llama2_13b_truthfulqa"
    return config
