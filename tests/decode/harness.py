"""Tasks of lm-evaluation-harness over documents {question, choices, answer}, run offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{choices[1]}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}{{choices[0]}}",
        "doc_to_target": "{{choices[1]}}",
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(directory: Path, docs: list[dict[str, Any]], until: list[str], tokens: int) -> Path:
    """Writes the documents and a file a task; texts end at `until` or after some tokens."""
    path = directory / "docs.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, fields in TASKS.items():
        data: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
        }
        if name == "generation":
            data["generation_kwargs"] = {
                "until": until, "max_gen_toks": tokens, "do_sample": False
            }  # fmt: skip
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({**data, **fields}))
    return directory


def evaluate(model, tasks: Path, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """By task, the answers of each document; and all that lm_eval returns."""
    results: Any = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **fields,
    )
    answers = {
        task: [[resp[0] for resp in sample["resps"]] for sample in samples]
        for task, samples in results["samples"].items()
    }
    return answers, results


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Of log-likelihoods; what is greedy, and the texts, must be equal."""
    apart = [0.0]
    for one, other in zip(ours["choice"], theirs["choice"], strict=True):
        assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
        apart += [abs(a - b) for (a, _), (b, _) in zip(one, other, strict=True)]
    for [one], [other] in zip(ours["perplexity"], theirs["perplexity"], strict=True):
        apart.append(abs(one - other))
    assert ours["generation"] == theirs["generation"]
    return max(apart)


def stay_offline(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """The datasets library asks no hub, and keeps what it makes in `cache`."""
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
