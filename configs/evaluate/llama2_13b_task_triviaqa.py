"""TriviaQA on Llama-2 13B, proxy-tuned with a 7B tuned on the task (Liu et al. 2024, section 5).

python -m train.sft --config=configs/train/llama2_7b_triviaqa.py
python -m train.sft --config=configs/train/llama2_7b_triviaqa.py \\
    --config.base=meta-llama/Llama-2-13b-hf --config.output_dir=runs/llama2_13b_triviaqa
python -m decode.evaluate --config=configs/evaluate/llama2_13b_task_triviaqa.py

The second makes the directly tuned 13B; --config.tuned.path= leaves it out, and
--config.tuned.path=runs/llama2_13b_triviaqa_lora takes the LoRA baseline in its place.
"""

from configs import llama2_13b_task
from configs.evaluate.defaults import evaluation


def get_config():
    config = evaluation(llama2_13b_task.get_config(), "triviaqa")
    config.expert.path = "runs/llama2_7b_triviaqa"
    config.tuned.path = "runs/llama2_13b_triviaqa"
    config.batch_size = 32
    config.output_dir = "runs/evaluate/llama2_13b_task_triviaqa"
    return config
