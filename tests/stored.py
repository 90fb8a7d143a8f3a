"""Official data files and stored outputs of the published code, where this machine has them.

$PROXY_JAX_DATA: a directory with gsm8k/test.jsonl, humaneval/HumanEval.jsonl.gz,
truthfulqa/TruthfulQA.jsonl and realtimeqa/questions.jsonl. $PROXY_JAX_REFERENCE: a directory with
all_metrics.json and, an experiment, NAME.jsonl.gz (one line a completion) and NAME.metrics.json.
"""

import gzip
import json
import os
from pathlib import Path

import pytest

_SHARED = Path(__file__).parents[2] / "shared"


def data(name: str) -> str:
    return _find("PROXY_JAX_DATA", "data", name)


def outputs(name: str) -> list[dict]:
    path = _find("PROXY_JAX_REFERENCE", "reference_outputs", f"{name}.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def metrics(name: str) -> dict:
    file = "all_metrics.json" if name == "all" else f"{name}.metrics.json"
    return json.loads(Path(_find("PROXY_JAX_REFERENCE", "reference_outputs", file)).read_text())


def _find(variable: str, folder: str, name: str) -> str:
    path = Path(os.environ.get(variable) or _SHARED / folder) / name
    if not path.exists():
        pytest.skip(f"${variable} has no {name}")
    return str(path)
