"""What HumanEval and DS-1000 share: sampling, clean-up of completions, and pass@k."""

from __future__ import annotations

from collections.abc import Sequence

from decode.tasks.execution import Outcome
from decode.tasks.statistics import pass_at_k
from decode.tasks.task import Metric, Scored

TEMPERATURE, TOP_P, SAMPLES, MAX_NEW_TOKENS = 0.8, 0.95, 20, 512
BANNED = ("pass", "...")  # bodies that do nothing
KS = (10, 1)
METRICS = tuple(Metric(f"pass@{k}") for k in KS)


def clean(completion: str) -> str:
    """A completion without lines that print or assert, and without what ends in white space."""
    lines = completion.split("\n")
    kept = [line for line in lines if not line.strip().startswith(("assert", "print"))]
    return "\n".join(kept).rstrip()


def scored(completion: str, outcome: Outcome) -> Scored:
    """A completion and how its program ended."""
    return Scored(completion, {"passed": float(outcome.passed)}, outcome.result)


def combine(samples: Sequence[Scored]) -> dict[str, float | None]:
    """pass@k of one problem; None where there are fewer than k samples."""
    passed = sum(bool(one.values["passed"]) for one in samples)
    n = len(samples)
    return {f"pass@{k}": pass_at_k(n, passed, k) if n >= k else None for k in KS}
