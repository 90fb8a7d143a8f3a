"""GSM8K on a laptop: the trio of configs/qwen_gguf_gsm.py on the first 128 test questions.

The sweep over alpha takes 64 of them. The first command makes the ceiling, the 1.5B tuned directly
by the expert's recipe; without it, leave out --config.tuned.adapter.

python -m train.sft --config=configs/train/qwen_gguf_gsm.py --config.data.path=gsm8k_train.jsonl \\
    --config.base=~/.cache/proxy_jax/models/qwen2.5-coder-1.5b-instruct.gguf \\
    --config.output_dir=runs/qwen_gguf_gsm_direct
python -m decode.evaluate --config=configs/evaluate/qwen_gguf_gsm.py \\
    --config.tasks.gsm.data=test.jsonl --config.tuned.adapter=runs/qwen_gguf_gsm_direct
"""

from configs import qwen_gguf_gsm
from configs.evaluate.defaults import evaluation


def get_config():
    config = evaluation(qwen_gguf_gsm.get_config(), "gsm")
    config.tasks.gsm.limit = 128
    config.tasks.gsm.max_new_tokens = 200
    config.sweep.alphas = (0.5, 1.0, 1.5, 2.0)
    config.sweep.limit = 64
    config.output_dir = "runs/evaluate/qwen_gguf_gsm"
    return config
