"""An instruction expert: Llama-2 7B on chat messages, the recipe of Liu et al. 2024's experts.

The paper takes Llama-2 7B chat ready-made (configs/llama2_13b_chat.py); this makes its like.
With LoRA: --config.lora.rank=64 --config.lora.dropout=0.1 --config.optimizer.learning_rate=1e-4
"""

from configs.train import llama2_7b_gsm

# Tulu's format; the base model's tokenizer has none.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def get_config():
    config = llama2_7b_gsm.get_config()
    config.data.path = "allenai/tulu-v2-sft-mixture"
    config.data.format = "messages"
    config.data.chat_template = _CHAT_TEMPLATE
    config.packing = True
    config.checkpoint_every = 500
    config.output_dir = "runs/llama2_7b_instruct"
    return config
