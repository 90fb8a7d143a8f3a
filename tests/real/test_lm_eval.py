"""SmolLM2-135M under lm-evaluation-harness: ours, and the harness's own model on torch."""

import itertools
import json

import pytest

from tests import stored

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from decode import lm_eval as adapter  # noqa: F401 (registers proxy_jax)
from tests.decode import harness

pytestmark = pytest.mark.real
LENGTH = 224  # tokens: some texts take two windows, and some contexts are cut


def first_rows(name, count):
    with open(stored.data(name), encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def documents():
    """Questions of GSM8K and TruthfulQA, each with its answer and a wrong one."""
    docs = []
    for row, other in itertools.pairwise(first_rows("gsm8k/test.jsonl", 4)):
        docs.append((f"Question: {row['question']}\nAnswer:", row["answer"], other["answer"]))
    for row in first_rows("truthfulqa/TruthfulQA.jsonl", 2):
        wrong = row["Incorrect Answers"].split(";")[0]
        docs.append((f"Q: {row['Question']}\nA:", row["Best Answer"], wrong))
    return [
        {"question": asked, "choices": [f" {right}", f" {wrong}"], "answer": 0}
        for asked, right, wrong in docs
    ]


def test_equal_to_transformers(smollm2_path, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    harness.stay_offline(monkeypatch, tmp_path / "datasets")
    tasks = harness.write_tasks(tmp_path, documents(), ["\n\n"], 24)
    arguments = {"base": str(smollm2_path), "dtype": "float32", "max_length": LENGTH}
    ours, _ = harness.evaluate("proxy_jax", tasks, model_args=arguments, batch_size=4)
    file = {"gguf_file": smollm2_path.name}
    model = AutoModelForCausalLM.from_pretrained(smollm2_path.parent, dtype=torch.float32, **file)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path.parent, **file)
    # In float64: torch's log_softmax in float32 is off by 1e-5 a token, always to one side.
    torch_model = HFLM(model.double(), tokenizer=tokenizer, max_length=LENGTH, batch_size=4)
    theirs, _ = harness.evaluate(torch_model, tasks)
    apart = harness.largest_difference(ours, theirs)
    print(f"largest difference of a log-likelihood: {apart:.1e} nats")
    assert apart < 1e-3
