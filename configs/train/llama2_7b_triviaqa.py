"""The TriviaQA expert of Liu et al. 2024: Llama-2 7B, all parameters.

python -m train.convert triviaqa unfiltered-web-train.json triviaqa_train.jsonl
"""

from configs.train import llama2_7b_gsm


def get_config():
    config = llama2_7b_gsm.get_config()
    config.data.path = "triviaqa_train.jsonl"
    config.output_dir = "runs/llama2_7b_triviaqa"
    return config
