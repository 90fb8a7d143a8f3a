"""Proxy-tuning in minutes: a family of models from scratch, and what tuning its small one does.

    make quickstart                      # or, in an environment:
    python quickstart.py --seeds=3       # three worlds, each with its family

An invented world is written down (train/corpus.py): its facts, and pages of questions, seldom with
an answer. M- and M, ten times as large, learn it. They know the facts, M more of them, but after a
question they write the next question. Then M- is tuned on a few hundred questions with answers.
The result, M+, answers as far as M- knew. Proxy-tuning adds what this did to the logits of the
small model to those of M, which is not touched: it answers as M+ does, and knows what M knows. The
ceiling is M tuned directly on the same questions.

Everything is kept in runs/quickstart, and what is there is not made again. The questions measured
on are about people and places that neither the corpus nor the tuning asks about. Sizes and rates
were chosen on the development questions, never on these.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.quickstart import (
    decode,
    evaluate,
    pretrain_large,
    pretrain_small,
    tune_large,
    tune_small,
)
from decode.evaluate import main as run_evaluation
from decode.generate import main as run_decoding
from proxy_jax.jobs import launch
from proxy_jax.jobs.exits import one_line_errors
from train.corpus import write_world
from train.sft import main as run_training

WHAT = {
    "antiexpert": "M-       small, untuned",
    "base": "M        large, untuned",
    "expert": "M+       small, tuned",
    "proxy": "proxy    M + (M+ - M-)",
    "tuned": "ceiling  large, tuned",
}


def main(seeds: int) -> None:
    """Makes and measures one family a seed."""
    tasks = [run_seed(seed) for seed in range(seeds)]
    show(tasks)


def run_seed(seed: int) -> dict[str, Any]:
    """A world and a family, and the results of its evaluation on the held-out questions."""
    world = Path(pretrain_small.get_config(seed).data.path).parent
    if not world.exists():
        print("The world: inventing people and places, writing about them, making a tokenizer")
        write_world(world, seed)

    train("M-: the small model, from scratch", pretrain_small.get_config(seed))
    train("M: the large model, from scratch", pretrain_large.get_config(seed))
    train("M+: the small model, tuned to answer", tune_small.get_config(seed))
    train("The ceiling: the large model, tuned to answer", tune_large.get_config(seed))

    print("The held-out questions, answered by each model and by the proxy")
    evaluation = evaluate.get_config(seed)
    run_evaluation(evaluation)
    run_decoding(decode.get_config(seed))  # some of them once more, token by token
    results = json.loads(Path(evaluation.output_dir, "results.json").read_text())
    return results["tasks"]["questions"]


def train(what: str, config: ConfigDict) -> None:
    """Runs train.sft, unless its result is there."""
    if not Path(config.output_dir, "expert").exists():
        print(what)
        run_training(config)


def show(tasks: Sequence[Mapping[str, Any]]) -> None:
    """Prints the share of the questions that each row answers, of the gap closed, and the pages.

    Args:
      tasks: results of each seed.
    """
    print(f"\n{'questions answered':32}" + "".join(f"  seed {i}" for i in range(len(tasks))))
    for row, what in WHAT.items():
        values = [task["rows"][row]["metrics"]["exact_match"]["value"] for task in tasks]
        print(f"{what:32}" + "".join(f"{value:8.1%}" for value in values))
    gaps = [task["gap_closed"]["exact_match"]["value"] for task in tasks]
    shares = ["       -" if gap is None else f"{gap:8.1%}" for gap in gaps]
    print(f"{'gap closed':32}" + "".join(shares))
    for seed in range(len(tasks)):
        home = Path(evaluate.get_config(seed).output_dir).parent
        print(f"plots and examples: {home}/report/report.html")
        print(f"token by token:     {home}/tokens/tokens.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many worlds and families")
    given = parser.parse_args()
    launch.use_compilation_cache()
    with one_line_errors():
        main(given.seeds)
