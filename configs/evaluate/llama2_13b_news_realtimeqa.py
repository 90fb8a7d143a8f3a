"""RealTimeQA on Llama-2 13B, proxy-tuned with a 7B that has read the news (Liu et al. 2024).

There M is a black box of OpenAI's that gives a few first tokens; here an open model in its place.
The likeliest letter is the answer, as there.

python -m train.sft --config=configs/train/llama2_7b_news.py
python -m decode.evaluate --config=configs/evaluate/llama2_13b_news_realtimeqa.py \\
    --config.tasks.realtimeqa.data=questions.jsonl
"""

from configs import llama2_13b_task
from configs.evaluate.defaults import evaluation


def get_config():
    config = evaluation(llama2_13b_task.get_config(), "realtimeqa")
    config.expert.path = "runs/llama2_7b_news"
    config.tasks.realtimeqa.letters = True
    config.batch_size = 32
    config.output_dir = "runs/evaluate/llama2_13b_news_realtimeqa"
    return config
