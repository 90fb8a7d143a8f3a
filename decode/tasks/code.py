"""What HumanEval and DS-1000 share: sampling, clean-up of completions, and pass@k."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from decode.tasks.execution import Outcome
from decode.tasks.statistics import pass_at_k
from decode.tasks.task import NO_CHAT, Decoding, Example, Form, Metric, Scored, Task

_KS = (10, 1)
_SAMPLED = Decoding(
    max_new_tokens=512,
    temperature=0.8,
    top_p=0.95,
    samples=20,
    # Bodies that do nothing; only this spelling, as in the published runs.
    banned_tokens=("pass", "..."),
)


def make_task(
    name: str,
    form: Form,
    examples: Sequence[Example],
    score: Callable[[Sequence[Example], Sequence[str]], list[Scored]],
    stop: tuple[str, ...],
    banned_first_tokens: tuple[str, ...] = (),
) -> Task:
    """A task whose completions are sampled and run; see Task and Decoding for the arguments."""
    return Task(
        name=name,
        form=form,
        examples=tuple(examples),
        templates=NO_CHAT,
        decoding=dataclasses.replace(_SAMPLED, stop=stop, banned_first_tokens=banned_first_tokens),
        metrics=tuple(Metric(f"pass@{k}") for k in _KS),
        score=score,
        combine=_pass_at_ks,
    )


def clean(completion: str) -> str:
    """A completion without lines that print or assert, and without white space at the end."""
    lines = completion.split("\n")
    kept = [line for line in lines if not line.strip().startswith(("assert", "print"))]
    return "\n".join(kept).rstrip()


def scored(completion: str, outcome: Outcome) -> Scored:
    """A completion and how its program ended."""
    return Scored(completion, {"passed": float(outcome.passed)}, outcome.result)


def _pass_at_ks(samples: Sequence[Scored]) -> dict[str, float | None]:
    """pass@k of one problem; None where there are fewer than k samples."""
    passed = sum(bool(one.values["passed"]) for one in samples)
    n = len(samples)
    return {f"pass@{k}": pass_at_k(n, passed, k) if n >= k else None for k in _KS}
