"""The two Qwen2.5-Coder models as a trio, against a plain torch loop over the same files.

The torch loop takes most of an hour on two cores; its answers are kept beside the models, so it
runs once. Questions are GSM8K's, $PROXY_JAX_DATA/gsm8k/test.jsonl.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from decode import Generator, Options
from proxy_jax.trio import ModelSpec, load_trio
from tests import stored
from tests.real import models, torch_trio

pytestmark = pytest.mark.real_trio
TIE = 1e-3  # two candidates this close may swap under another order of summation


@pytest.fixture(scope="module")
def questions() -> Path:
    return Path(stored.data("gsm8k/test.jsonl"))


@pytest.fixture(scope="module")
def oracle(questions) -> list[dict]:
    path = models.path(torch_trio.BASE).with_name("torch_trio_gsm8k.json")
    if not path.exists():
        # A process of its own, so that the torch models are gone before ours are loaded.
        command = [sys.executable, "-m", "tests.real.torch_trio", str(questions), str(path)]
        subprocess.run(command, check=True)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trio():
    base, small = (str(models.path(name)) for name in (torch_trio.BASE, torch_trio.SMALL))
    return load_trio(
        ModelSpec(base), ModelSpec(small, template="[INST] {prompt} [/INST]"), ModelSpec(small)
    )


@pytest.fixture(scope="module")
def prompts(questions) -> list[str]:
    lines = questions.read_text(encoding="utf-8").splitlines()[: torch_trio.ROWS]
    texts = [json.loads(line)["question"].strip() for line in lines]
    return [f"Answer the following question.\n\nQuestion: {text}\nAnswer:" for text in texts]


def decode(trio, prompts, alpha, batch_size):
    options = Options(
        batch_size=batch_size,
        max_new_tokens=torch_trio.MAX_NEW_TOKENS,
        alpha=alpha,
        eos_ids=torch_trio.EOS_IDS,
    )
    return [list(c.token_ids) for c in Generator(trio, options).generate(prompts)]


def differing(found, record) -> int | None:
    """The first step at which ids differ and did not have to; None if there is none."""
    for step, (ours, theirs) in enumerate(zip(found, record["ids"], strict=False)):
        if record["margins"][step] < TIE:
            return None  # from here on the contexts may differ
        if ours != theirs:
            return step
    return None if len(found) == len(record["ids"]) else min(len(found), len(record["ids"]))


@pytest.mark.parametrize("alpha", torch_trio.ALPHAS)
def test_greedy_ids_equal_the_torch_loop(trio, prompts, oracle, alpha):
    records = sorted((r for r in oracle if r["alpha"] == alpha), key=lambda r: r["index"])
    found = decode(trio, prompts, alpha, batch_size=8)
    wrong = {
        record["index"]: step
        for ids, record in zip(found, records, strict=True)
        if (step := differing(ids, record)) is not None
    }
    assert not wrong, f"first differing step by row: {wrong}"


def test_one_at_a_time_equals_a_batch(trio, prompts):
    assert decode(trio, prompts, 1.0, batch_size=1) == decode(trio, prompts, 1.0, batch_size=8)
