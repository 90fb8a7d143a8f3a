"""Scoring GSM8K's answers on a real trio: eleven alphas read the texts as often as one does."""

import json
import time

import numpy as np
import pytest

from decode import score
from decode.score import Scorer, make_passages
from proxy_jax.trio import ModelSpec, load_trio
from tests import stored

pytestmark = pytest.mark.real
ROWS = 4


def test_eleven_alphas_take_one_pass_of_each_model(smollm2_path, monkeypatch):
    """The times are for people to look at: a machine that does other work makes them vary."""
    with open(stored.data("gsm8k/test.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(ROWS)]
    model = ModelSpec(str(smollm2_path), "float32")
    loaded = load_trio(model, model, model)
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]
    passages = make_passages(loaded.trio, pairs)
    hidden, passes = score.hidden, []

    def seen(*args):
        passes.append(args[1])
        return hidden(*args)

    monkeypatch.setattr(score, "hidden", seen)
    alphas = {1: [1.0], 11: np.linspace(0.0, 2.0, 11).tolist()}
    found, counts, seconds = {}, {}, {}
    for count, some in alphas.items():
        scorer = Scorer(loaded, some, batch_size=ROWS)
        dict(scorer.stream(passages))  # compiles
        passes.clear()
        before = time.process_time()
        found[count] = dict(scorer.stream(passages))
        seconds[count] = time.process_time() - before
        counts[count] = sorted(passes)
    print(f"one alpha {seconds[1]:.1f} s, eleven {seconds[11]:.1f} s of processor time, "
          f"{seconds[11] / seconds[1]:.2f} times")  # fmt: skip
    assert counts[1] == counts[11]
    assert set(counts[1]) == {0, 1, 2}
    for index, one in found[1].items():
        np.testing.assert_array_equal(found[11][index].log_probs[5], one.log_probs[0])
