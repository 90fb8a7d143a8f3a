"""The held-out questions, answered by M, M+, M-, the proxy and the ceiling of the quickstart."""

from configs.evaluate.defaults import evaluation
from configs.quickstart import decode


def get_config(seed="0"):
    home = f"runs/quickstart/{seed}"
    config = evaluation(decode.get_config(seed), "questions")
    config.tuned.path = f"{home}/ceiling/expert"
    config.tasks.questions.data = f"{home}/world/held_out.jsonl"
    config.tasks.questions.max_new_tokens = 20
    config.sweep.alphas = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    config.sweep.limit = 100
    config.output_dir = f"{home}/report"
    return config
