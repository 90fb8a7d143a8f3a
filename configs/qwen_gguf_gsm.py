"""GSM8K on a laptop: M is Qwen2.5-Coder 1.5B, M+ the 0.5B with the adapter of train/qwen_gguf_gsm.

Each question is read as in Liu et al. 2024, greedy.

python -m decode.generate --config=configs/qwen_gguf_gsm.py --config.prompts.path=test.jsonl
"""

from configs import qwen_gguf


def get_config():
    config = qwen_gguf.get_config()
    config.expert.template = "raw"
    config.expert.adapter = "runs/qwen_gguf_gsm/expert/adapter"
    config.plan = "shared"
    config.prompts.template = "Answer the following question.\n\nQuestion: {question}\nAnswer:"
    config.sampling.temperature = 0.0
    config.max_new_tokens = 200
    config.batch_size = 32
    config.output_dir = "runs/qwen_gguf_gsm_proxy"
    return config
