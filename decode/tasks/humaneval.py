"""HumanEval: functions from their signature and docstring, checked by tests (Chen et al. 2021).

published: the prompt as it is, with its line break at the end. clean: without it, since tokenizers
that join a line break with the indentation after it have it in the first new token.
"""

from __future__ import annotations

from collections.abc import Sequence

from decode.tasks import code
from decode.tasks.execution import Limits, run_programs
from decode.tasks.task import Example, Form, Scored, Task
from proxy_jax.errors import InputError
from proxy_jax.rows import Hub, Row, read_rows
from proxy_jax.tokenization import Prompt

_HUB = Hub("openai/openai_humaneval")
_LIMITS = Limits(seconds=3.0)


def load(location: str = "", form: Form = "published") -> Task:
    """The task; its data is the official HumanEval.jsonl.gz.

    Raises:
      InputError: data that cannot be used.
    """
    return code.make_task(
        "humaneval",
        form,
        [_example(row, form) for row in read_rows(location, _HUB)],
        score,
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    )


def score(examples: Sequence[Example], texts: Sequence[str]) -> list[Scored]:
    """Runs each completion against the tests of its problem."""
    completions = [code.clean(text) for text in texts]
    programs = [
        f"{example.prompt.text}{completion}\n{example.fields['test']}\n"
        f"check({example.fields['entry_point']})"
        for example, completion in zip(examples, completions, strict=True)
    ]
    outcomes = run_programs(programs, _LIMITS)
    return [code.scored(*pair) for pair in zip(completions, outcomes, strict=True)]


def _example(row: Row, form: Form) -> Example:
    text = row.text("prompt")
    prompt = Prompt(text if form == "published" else text.rstrip())
    fields = {"test": row.text("test"), "entry_point": row.text("entry_point")}
    if not fields["entry_point"].isidentifier():
        raise InputError(f"{row.where}: entry_point must be a name, not {fields['entry_point']!r}")
    if "def check(" not in fields["test"]:
        raise InputError(f"{row.where}: test has no check")
    return Example(row.text("task_id"), prompt, prompt, fields)
