"""DS-1000: data-science problems from Stack Overflow, completion mode (Lai et al. 2022).

The published experiment takes 200 of the 1,000. A problem's program runs the generated code in its
context and compares the result; the libraries that the problems are about must be installed here.

published: the prompt with a line break at the end. clean: without.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from decode.tasks import code
from decode.tasks.execution import Limits, run_programs
from decode.tasks.task import Example, Form, Scored, Task, example_id
from proxy_jax.errors import InputError
from proxy_jax.rows import Hub, Row, read_rows
from proxy_jax.tokenization import Prompt

_HUB = Hub("xlangai/DS-1000")
_PROBLEMS, _SEED = 200, 42
_SECONDS_A_TEST = 60.0
_MOST_TESTS = 1000  # more are a mistake, and would have their seconds
_MEMORY_BYTES = 16 << 30
# In the order in which the published code reads them, with the module that each needs.
_LIBRARIES = {
    "Pandas": "pandas",
    "Numpy": "numpy",
    "Matplotlib": "matplotlib",
    "Tensorflow": "tensorflow",
    "Scipy": "scipy",
    "Sklearn": "sklearn",
    "Pytorch": "torch",
}
_SHOWS = ("plt.show()", "plt.clf()", "plt.close()", "savefig")  # would lose the figure to compare


def load(location: str = "", form: Form = "published") -> Task:
    """The task; its data is the official ds1000.jsonl.gz (prompt, code_context, metadata).

    Raises:
      InputError: data that cannot be used, or a library that is not installed.
    """
    rows = sample(read_rows(location, _HUB))
    examples = [_example(row, form) for row in rows]
    needed = {_LIBRARIES[example.groups["library"]] for example in examples}
    if absent := sorted(name for name in needed if importlib.util.find_spec(name) is None):
        raise InputError(
            f"ds1000: the problems need {', '.join(absent)}, which this environment lacks "
            "(packages pandas, matplotlib, tensorflow, scipy, scikit-learn, torch)"
        )
    return code.make_task(
        "ds1000",
        form,
        examples,
        score,
        stop=("\n</code>", "\n# SOLUTION END", "\nEND SOLUTION"),
        banned_first_tokens=("</",),
    )


def sample(rows: Sequence[Row]) -> list[Row]:
    """The published problems, in the order of the published draw; all, if there are not more.

    That order is pandas' DataFrame.sample(200, random_state=42) over the libraries one after the
    other, which is numpy's RandomState.choice.
    """
    order = list(_LIBRARIES)
    ordered = sorted(rows, key=lambda row: order.index(_library(row)))
    if len(ordered) <= _PROBLEMS:
        return ordered
    drawn = np.random.RandomState(_SEED).choice(len(ordered), size=_PROBLEMS, replace=False)
    return [ordered[i] for i in drawn]


def score(examples: Sequence[Example], texts: Sequence[str]) -> list[Scored]:
    """Runs each completion in the context of its problem."""
    completions = [_clean(example, text) for example, text in zip(examples, texts, strict=True)]
    programs = [
        _program(example.fields["context"], completion)
        for example, completion in zip(examples, completions, strict=True)
    ]
    limits = [Limits(e.fields["tests"] * _SECONDS_A_TEST, _MEMORY_BYTES) for e in examples]
    outcomes = run_programs(programs, limits)
    return [code.scored(*pair) for pair in zip(completions, outcomes, strict=True)]


def _clean(example: Example, text: str) -> str:
    completion = code.clean(text)
    if example.groups["library"] == "Matplotlib":
        lines = completion.split("\n")
        completion = "\n".join(line for line in lines if not any(s in line for s in _SHOWS))
    return completion


def _program(context: str, completion: str) -> str:
    """The problem's own checks, applied to the completion."""
    checks = [name for name in ("test_execution", "test_string") if f"def {name}(" in context]
    calls = [f"{name}(completion)" for name in checks]
    return "\n".join([context, f"completion = {completion!r}", *calls, ""])


def _example(row: Row, form: Form) -> Example:
    metadata, context = row.part("metadata"), row.text("code_context")
    if "def test_execution(" not in context:
        raise InputError(f"{row.where}: code_context has no test_execution")
    text = row.text("prompt")
    if form == "published":
        text = text if text.endswith("\n") else f"{text}\n"
    else:
        text = text.rstrip("\n")
    return Example(
        example_id(metadata, "problem_id"),
        Prompt(text),
        Prompt(text),
        {"context": context, "tests": metadata.integer("test_case_cnt", 1, _MOST_TESTS)},
        {"library": _library(row), "perturbation": metadata.string("perturbation_type")},
    )


def _library(row: Row) -> str:
    return row.part("metadata").choice("library", tuple(_LIBRARIES))
