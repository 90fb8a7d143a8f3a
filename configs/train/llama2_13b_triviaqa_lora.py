"""The LoRA baseline of Liu et al. 2024 on TriviaQA: Llama-2 13B."""

from configs.train import llama2_13b_gsm_lora


def get_config():
    config = llama2_13b_gsm_lora.get_config()
    config.data.path = "triviaqa_train.jsonl"
    config.output_dir = "runs/llama2_13b_triviaqa_lora"
    return config
