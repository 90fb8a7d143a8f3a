"""External judges, as plug-ins: what texts are worth where only another model can say.

A judge is a function that is named in a config as "module:function". It gets examples and the
texts extracted from their completions, and answers, for each, the numbers that the task's
Judging.asks names:

    def toxicity(examples, texts):
        return [{"toxic": p} for p in my_classifier(texts)]
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from decode.tasks.task import Example, Scored, Task
from proxy_jax.errors import InputError
from proxy_jax.reading import reason, shown


class Judge(Protocol):
    """Says of each text what the task asks, as numbers from 0 to 1."""

    def __call__(
        self, examples: Sequence[Example], texts: Sequence[str]
    ) -> Sequence[Mapping[str, float]]:
        """Answers in the order of the texts."""


def load_judge(name: str) -> Judge:
    """Imports the function that "module:function" names.

    Raises:
      InputError: it is not there, or its module does not import.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InputError(f"judge {name!r}: expected module:function")
    with _running(f"judge {name!r}"):
        judge = getattr(importlib.import_module(module), attribute)
    if not callable(judge):
        raise InputError(f"judge {name!r}: {type(judge).__name__} is not a function")
    return judge


def ask_judge(
    task: Task, name: str, judge: Judge, examples: Sequence[Example], texts: Sequence[str]
) -> Iterator[dict[str, float]]:
    """Yields what a judge says of each text, checked, in their order.

    What was yielded holds, also where the judge fails at a later text.

    Args:
      name: of the judge, for errors.
      examples, texts: what it is asked; at least one, an example for each text.

    Raises:
      InputError: the task needs no judge; the judge raises, or leaves the program; its answers are
        not what the task asks.
    """
    if task.judging is None:
        raise InputError(f"{task.name} needs no judge")
    where = f"judge {name!r}, examples {examples[0].id} to {examples[-1].id}"
    answers: list[Any] = []
    failure = None
    try:
        with _running(where):
            said = judge(list(examples), list(texts))
            if said is None or isinstance(said, str | bytes | Mapping):
                raise InputError(f"expected a list of answers, not {shown(said)}")
            for answer in said:  # one by one, as it may fail at any of them
                answers.append(answer)
                if len(answers) > len(texts):
                    break
    except InputError as error:
        failure = error
    if failure is None and len(answers) != len(texts):  # which is of which?
        count = f"{len(answers)}" if len(answers) < len(texts) else f"more than {len(texts)}"
        raise InputError(f"{where}: {count} answers for {len(texts)} texts")
    for example, answer in zip(examples, answers, strict=False):
        place = f"judge {name!r}, example {example.id}"
        yield {asked: _share(answer, asked, place) for asked in task.judging.asks}
    if failure is not None:
        raise failure


def add_verdicts(
    task: Task, said: Sequence[Mapping[str, float]], scored: Sequence[Scored]
) -> list[Scored]:
    """Adds what a judge said of each text to the values of the scorer."""
    assert task.judging is not None
    return [
        dataclasses.replace(one, values={**one.values, **task.judging.values(answer)})
        for answer, one in zip(said, scored, strict=True)
    ]


def apply_judge(
    task: Task, judge: Judge, examples: Sequence[Example], scored: Sequence[Scored]
) -> list[Scored]:
    """Adds the judge's values to those of the scorer.

    Args:
      examples, scored: one of each for a completion, at least one.

    Raises:
      InputError: see `ask_judge`.
    """
    name = getattr(judge, "__name__", type(judge).__name__)
    texts = [one.extracted for one in scored]
    return add_verdicts(task, list(ask_judge(task, name, judge, examples, texts)), scored)


def _share(answer: Any, asked: str, where: str) -> float:
    wanted = f"must answer {asked!r} with a number from 0 to 1, not"
    with _running(where):
        try:
            value = answer[asked]
        except (LookupError, TypeError) as error:
            raise InputError(f"{wanted} {shown(answer)}") from error
        if isinstance(value, bool | np.bool_ | str | bytes):  # which float would take
            raise InputError(f"{wanted} {shown(value)}")
        share = float(value)
        if not 0 <= share <= 1:
            raise InputError(f"{wanted} {share}")
    return share


@contextlib.contextmanager
def _running(where: str) -> Iterator[None]:
    """Turns whatever foreign code raises into an InputError, an exit too; not an interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        raise InputError(f"{where}: it called sys.exit({shown(error.code)})") from error
    except InputError as error:
        raise InputError(f"{where}: {reason(error)}") from error
    except BaseException as error:
        raise InputError(f"{where}: {type(error).__name__}: {reason(error)}") from error
