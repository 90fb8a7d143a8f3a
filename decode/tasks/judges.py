"""External judges, as plug-ins: what texts are worth where only another model can say.

A judge is a function that is named in a config as "module:function". It gets examples and the
texts extracted from their completions, and answers, for each, the numbers that the task's
Judging.asks names:

    def toxicity(examples, texts):
        return [{"toxic": p} for p in my_classifier(texts)]
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from decode.tasks.task import Example, Scored, Task
from proxy_jax.errors import InputError


class Judge(Protocol):
    """Says of each text what the task asks, as numbers from 0 to 1."""

    def __call__(
        self, examples: Sequence[Example], texts: Sequence[str]
    ) -> Sequence[Mapping[str, float]]:
        """Answers in the order of the texts."""


def load_judge(name: str) -> Judge:
    """The function that "module:function" names.

    Raises:
      InputError: it is not there, or its module does not import.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InputError(f"judge {name!r}: expected module:function")
    try:
        judge = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module does when it is imported
        raise InputError(f"judge {name!r}: {type(error).__name__}: {error}") from error
    if not callable(judge):
        raise InputError(f"judge {name!r}: {type(judge).__name__} is not a function")
    return judge


def apply_judge(
    task: Task, judge: Judge, examples: Sequence[Example], scored: Sequence[Scored]
) -> list[Scored]:
    """Adds the judge's values to those of the scorer.

    Args:
      examples, scored: one of each for a completion.

    Raises:
      InputError: the task needs no judge, or the judge's answers are not what it asks.
    """
    if task.judging is None:
        raise InputError(f"{task.name} needs no judge")
    answers = list(judge(examples, [one.extracted for one in scored]))
    if len(answers) != len(scored):
        raise InputError(f"the judge answered {len(answers)} times for {len(scored)} texts")
    judged = []
    for example, one, answer in zip(examples, scored, answers, strict=True):
        said = {name: _number(answer, name, example.id) for name in task.judging.asks}
        values = {**one.values, **task.judging.values(said)}
        judged.append(dataclasses.replace(one, values=values))
    return judged


def _number(answer: Mapping[str, float], name: str, example: str) -> float:
    try:
        value = float(answer[name])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the judge must answer {name!r} with a number, not {answer!r} (example {example})"
        ) from error
    if not 0 <= value <= 1:
        raise InputError(f"the judge's {name!r} must be from 0 to 1, not {value} ({example})")
    return value
