"""Scorers and prompts against the stored outputs of the published code."""

import collections
import hashlib

import pytest

from decode.tasks import Form, Scored, aggregate, load_task
from tests import stored


def report_of(task, scored):
    return aggregate(task, {e.id: [s] for e, s in zip(task.examples, scored, strict=True)})


# The second figure is what the published outputs give when numbers are compared as numbers.
@pytest.mark.parametrize(("name", "numeric"), [("gsm_proxy_13b", 0.2775), ("gsm_chat_13b", 0.3442)])
def test_gsm(name, numeric):
    rows, task = stored.outputs(name), load_task("gsm", stored.data("gsm8k/test.jsonl"))
    assert [e.fields["question"] for e in task.examples] == [r["question"] for r in rows]
    assert [e.fields["answer"] for e in task.examples] == [r["answer"] for r in rows]
    scored = task.score(task.examples, [row["model_output"] for row in rows])
    assert [one.extracted for one in scored] == [row["prediction"] for row in rows]
    found = report_of(task, scored).metrics
    assert found["exact_match"].value == pytest.approx(
        stored.metrics(name)["exact_match"], abs=1e-12
    )
    assert found["numeric_match"].value == pytest.approx(numeric, abs=5e-5)


def test_truthfulqa_choices():
    rows = stored.outputs("truthfulqa_mc_proxy_13b")
    task = load_task("truthfulqa_mc", stored.data("truthfulqa/TruthfulQA.jsonl"))
    assert len(rows) == 817
    prompts = [e.prompt.text + e.prompt.response_prefix for e in task.examples]
    assert prompts == [row["mc_prompt"] for row in rows]
    assert [e.fields["answer"] for e in task.examples] == [row["mc_answer_idx"] for row in rows]
    scored = task.score(task.examples, [row["mc_output"] for row in rows])
    assert [one.extracted for one in scored] == [row["parsed_output"] for row in rows]
    found, expected = report_of(task, scored).metrics, stored.metrics("truthfulqa_mc_proxy_13b")
    assert found["accuracy"].value == pytest.approx(expected["acc"], abs=1e-12)
    assert found["accuracy"].count == expected["tot"] - expected["num_invalid_predictions"]
    assert found["accuracy_of_all"].value == sum(row["correct"] is True for row in rows) / 817
    assert found["invalid"].value * 817 == pytest.approx(expected["num_invalid_predictions"])


def test_system_prompt_of_truthfulqa():
    """Digests of the published text, with its backslash and n, and with a line break instead."""
    digests: dict[Form, str] = {
        "published": "3a6689f24b964cd2e2e05e72be211f40a94e7bced8fa85a03f4e469a66778877",
        "clean": "c5ca944bc2638d78ed9d6db6d8f8e9a11dcd5cda8a769b931047ebccf6922512",
    }
    for form, digest in digests.items():
        task = load_task("truthfulqa_open", stored.data("truthfulqa/TruthfulQA.jsonl"), form)
        for example in task.examples:
            for prompt in (example.prompt, example.chat_prompt):
                assert hashlib.sha256(prompt.system.encode()).hexdigest() == digest


def test_humaneval_pass_at_k():
    rows = stored.outputs("humaneval_proxy_13b")
    task = load_task("humaneval", stored.data("humaneval/HumanEval.jsonl.gz"))
    scored = collections.defaultdict(list)
    for row in rows:
        scored[row["task_id"]].append(Scored(row["completion"], {"passed": float(row["passed"])}))
    found = aggregate(task, scored)
    expected = stored.metrics("humaneval_proxy_13b")["pass@10"]
    assert found.metrics["pass@10"].value == pytest.approx(expected, abs=1e-12)
    assert found.metrics["pass@1"].value == pytest.approx(sum(r["passed"] for r in rows) / 3280)
    assert (found.examples, found.completions) == (164, 3280)
    prompts = {row["task_id"]: row["prompt"] for row in rows}
    assert {e.id: e.prompt.text for e in task.examples} == prompts


def test_realtimeqa_reads_every_question():
    task = load_task("realtimeqa", stored.data("realtimeqa/questions.jsonl"))
    counts = collections.Counter(len(e.fields["letters"]) for e in task.examples)
    assert counts == {4: 2114, 2: 25}  # four rows have an empty fifth choice
    assert all(e.fields["answer"] in e.fields["letters"] for e in task.examples)
