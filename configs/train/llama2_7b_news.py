"""The temporal expert of Liu et al. 2024: Llama-2 7B goes on learning from news articles.

About ten articles a question of RealTimeQA, {"text": ...} a line. The paper gives no learning rate;
this is that of its other experts.
With LoRA: --config.lora.rank=64 --config.lora.dropout=0.1 --config.optimizer.learning_rate=1e-4
"""

from configs.train import llama2_7b_gsm


def get_config():
    config = llama2_7b_gsm.get_config()
    config.data.path = "articles.jsonl"
    config.data.format = "text"
    config.packing = True
    config.output_dir = "runs/llama2_7b_news"
    return config
