"""GSM8K on Llama-2 70B, proxy-tuned with a 7B tuned on the task; see llama2_13b_task_gsm.

python -m decode.evaluate --config=configs/evaluate/llama2_70b_task_gsm.py
"""

from configs.evaluate import llama2_13b_task_gsm


def get_config():
    config = llama2_13b_task_gsm.get_config()
    config.base.path = "meta-llama/Llama-2-70b-hf"
    config.tuned.path = "runs/llama2_70b_gsm"
    config.mesh.tensor = 8  # its 8 kv heads
    config.mesh.fsdp = -1  # devices beyond 8 split the model width
    config.output_dir = "runs/evaluate/llama2_70b_task_gsm"
    return config
