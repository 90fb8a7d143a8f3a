"""Sampled completions of the published code run here, against what they did there. 30 s."""

import random

import pytest

from decode.tasks import load_task
from tests import stored

pytestmark = pytest.mark.reference


def test_execution_agrees_with_the_stored_results():
    task = load_task("humaneval", stored.data("humaneval/HumanEval.jsonl.gz"))
    examples = {example.id: example for example in task.examples}
    rows = random.Random(0).sample(stored.outputs("humaneval_proxy_13b"), 400)
    scored = task.score(
        [examples[row["task_id"]] for row in rows], [row["completion"] for row in rows]
    )
    other = [
        f"{row['task_id']}: {row['result']!r} there, {one.note!r} here"
        for row, one in zip(rows, scored, strict=True)
        if row["passed"] != bool(one.values["passed"])
    ]
    assert len(other) <= 4, "\n".join(other)
