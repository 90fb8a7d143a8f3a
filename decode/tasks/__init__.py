"""The experiments of the paper as tasks, one file each, and questions of your own.

task = load_task("gsm", "test.jsonl")
options = task.decoding.options(Options(batch_size=32))
texts = [...]                               # of each example's prompt, decoded with options
scored = task.score(task.examples, texts)
report = aggregate(task, {e.id: [s] for e, s in zip(task.examples, scored)})
"""

from collections.abc import Callable

from decode.tasks import (
    alpaca_eval,
    ds1000,
    gsm,
    humaneval,
    questions,
    realtimeqa,
    toxigen,
    triviaqa,
    truthfulqa,
)
from decode.tasks.judges import Judge, add_verdicts, apply_judge, ask_judge, load_judge
from decode.tasks.statistics import Estimate, gap_closed
from decode.tasks.task import Example, Form, Report, Scored, Task, aggregate, example_values
from proxy_jax.errors import InputError

TASKS: dict[str, Callable[[str, Form], Task]] = {
    "alpaca_eval": alpaca_eval.load,
    "ds1000": ds1000.load,
    "gsm": gsm.load,
    "humaneval": humaneval.load,
    "questions": questions.load,
    "realtimeqa": realtimeqa.load,
    "toxigen": toxigen.load,
    "triviaqa": triviaqa.load,
    "truthfulqa_mc": truthfulqa.load_choices,
    "truthfulqa_open": truthfulqa.load_open,
}


def load_task(name: str, location: str = "", form: Form = "published") -> Task:
    """Loads a task and its data.

    Args:
      name: of TASKS.
      location: the official file, or for ToxiGen its directory; the hub id of a copy; or "" for
        the hub's own.
      form: published, the prompts of the paper's code with their quirks; or clean, without.

    Raises:
      InputError: an unknown name, or data that cannot be used.
    """
    if name not in TASKS:
        raise InputError(f"task {name!r} is unknown; use {', '.join(TASKS)}")
    return TASKS[name](location, form)


__all__ = [
    "TASKS",
    "Estimate",
    "Example",
    "Form",
    "Judge",
    "Report",
    "Scored",
    "Task",
    "add_verdicts",
    "aggregate",
    "apply_judge",
    "ask_judge",
    "example_values",
    "gap_closed",
    "load_judge",
    "load_task",
]
