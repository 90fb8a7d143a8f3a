"""An oracle for proxy-tuning in plain torch and transformers: slow, obvious, one row at a time.

The combined logits are s = s_M + alpha * (s_M+ - s_M-) (Liu et al. 2024). Nothing here comes from
the code that it checks.

Run ``python -m tests.real.torch_trio QUESTIONS.jsonl ORACLE.json`` to record greedy answers of a
real trio: M is Qwen2.5-Coder 1.5B, M+ and M- are both the 0.5B and differ in their prompts.
"""

import argparse
import itertools
import json
import os
import pathlib
import time
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import models

BASE = "qwen2.5-coder-1.5b-instruct"
SMALL = "qwen2.5-coder-0.5b-instruct"
ROWS = 16
ALPHAS = (1.0, 0.5, -0.5)
MAX_NEW_TOKENS = 48
EOS_IDS = (151645, 151643)


class Loaded(NamedTuple):
    """A causal language model in float32 with its tokenizer."""

    model: Any
    tokenizer: Any


def load(name: str) -> Loaded:
    """Load one of the models of tests.real.models, dequantised to float32."""
    file = models.path(name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return Loaded(model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))


@torch.inference_mode()
def greedy(
    base: Loaded,
    expert: Loaded,
    antiexpert: Loaded,
    base_ids: list[int],
    expert_ids: list[int],
    alpha: float,
    max_new_tokens: int,
    eos_ids: Collection[int],
) -> tuple[list[int], list[float]]:
    """Continue one prompt; return the new ids and the top-two gap of the combined logits.

    The antiexpert reads base_ids, as the base does. An EOS id ends the answer and is part of it.
    Ids beyond the base's tokenizer are never chosen.
    """
    trio = (base.model, expert.model, antiexpert.model)
    inputs = [torch.tensor([ids]) for ids in (base_ids, expert_ids, base_ids)]
    caches: list[Any] = [None, None, None]
    new_ids: list[int] = []
    margins: list[float] = []
    while len(new_ids) < max_new_tokens:
        scores = []
        for i, model in enumerate(trio):
            out = model(input_ids=inputs[i], past_key_values=caches[i], use_cache=True)
            caches[i] = out.past_key_values
            scores.append(out.logits[0, -1])
        combined = scores[0] + alpha * (scores[1] - scores[2])
        combined[len(base.tokenizer) :] = -torch.inf
        top = torch.topk(combined, 2).values
        margins.append(float(top[0] - top[1]))
        new_ids.append(int(torch.argmax(combined)))
        if new_ids[-1] in eos_ids:
            break
        inputs = [torch.tensor([new_ids[-1:]])] * 3
    return new_ids, margins


def main() -> None:
    """Record the answers to the first questions of a JSON-lines file, for each alpha."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", type=pathlib.Path, help="JSON lines with the field question")
    parser.add_argument("output", type=pathlib.Path, help="JSON file, rewritten after each answer")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    base, small = load(BASE), load(SMALL)
    print(f"loaded both models in {time.monotonic() - start:.0f} s", flush=True)

    records: list[dict[str, Any]] = []
    with open(args.questions, encoding="utf-8") as file:
        lines = list(itertools.islice(file, ROWS))
    for index, line in enumerate(lines):
        question = json.loads(line)["question"].strip()
        prompt = f"Answer the following question.\n\nQuestion: {question}\nAnswer:"
        base_ids, expert_ids = (
            base.tokenizer(text, add_special_tokens=True).input_ids
            for text in (prompt, f"[INST] {prompt} [/INST]")
        )
        for alpha in ALPHAS:
            ids, margins = greedy(
                base, small, small, base_ids, expert_ids, alpha, MAX_NEW_TOKENS, EOS_IDS
            )
            records.append(
                {
                    "index": index,
                    "alpha": alpha,
                    "base_ids": base_ids,
                    "expert_ids": expert_ids,
                    "ids": ids,
                    "margins": margins,
                    "text": base.tokenizer.decode(ids, skip_special_tokens=True),
                }
            )
            partial = args.output.with_name(f"{args.output.name}.partial")
            partial.write_text(json.dumps(records, indent=1), encoding="utf-8")
            os.replace(partial, args.output)
            print(
                f"row {index} alpha {alpha}: {len(ids)} ids, smallest margin {min(margins):.5f}, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
