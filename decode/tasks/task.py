"""What a task is: its examples, how they are decoded, how texts are scored, what is reported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from decode.requests import Options
from decode.sampling import Sampling, Truncation
from decode.tasks.statistics import Estimate, estimate
from proxy_jax.errors import InputError
from proxy_jax.reading import shown
from proxy_jax.rows import Row
from proxy_jax.tokenization import Prompt

Form = Literal["published", "clean"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
      id: unique in its task.
      prompt: what the roles of a trio read, and a model without a chat format alone.
      chat_prompt: what a chat model alone is asked; the published code words it differently.
      fields: what scoring needs, and what a judge may want to read.
      groups: kinds of subset and the one it belongs to, {"library": "Pandas"}.
    """

    id: str
    prompt: Prompt
    chat_prompt: Prompt
    fields: Mapping[str, Any]
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Templates:
    """How chat models are prompted (proxy_jax.tokenization.Template); all others read "raw".

    Attributes:
      expert: of M+ in a trio, on Example.prompt.
      alone: of a chat model that decodes alone, on Example.chat_prompt.
    """

    expert: str
    alone: str


# What the published code feeds Llama-2-chat, inside a trio and alone.
PUBLISHED_CHAT = Templates("reference", "[INST] {prompt} [/INST]")
OWN_CHAT = Templates("chat", "chat")
NO_CHAT = Templates("raw", "raw")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a task decodes; the fields are those of decode.requests.Options.

    Attributes:
      temperature, top_p: None is greedy, and no truncation.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    samples: int = 1
    stop: tuple[str, ...] = ()
    banned_tokens: tuple[str, ...] = ()
    banned_first_tokens: tuple[str, ...] = ()

    def options(self, run: Options) -> Options:
        """The options of a run (batch size, alpha, seed, ...) with the settings of the task."""
        return dataclasses.replace(
            run,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, Truncation(top_p=self.top_p)),
            samples=self.samples,
            stop=self.stop,
            banned_tokens=self.banned_tokens,
            banned_first_tokens=self.banned_first_tokens,
        )


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure of a report: the mean of the examples' values.

    Attributes:
      name: of the value.
      higher_is_better: None for a description that is neither good nor bad.
      share: its values are between 0 and 1.
    """

    name: str
    higher_is_better: bool | None = True
    share: bool = True


@dataclasses.dataclass(frozen=True)
class Scored:
    """What one text is worth.

    Attributes:
      extracted: what was taken from the text: the number, the letter, the cleaned code.
      values: by name; None where the text does not count for a metric.
      note: why, where there is something to say ("timed out").
    """

    extracted: str
    values: Mapping[str, float | None]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Judging:
    """The part of a task's metrics that only an external judge can give.

    Attributes:
      asks: what the judge says of each text, numbers from 0 to 1.
      values: from that to values of metrics.
    """

    asks: tuple[str, ...]
    values: Callable[[Mapping[str, float]], Mapping[str, float]]


def mean_of_samples(samples: Sequence[Scored]) -> dict[str, float | None]:
    """Values of one example: means over its samples, of those that count."""
    names = dict.fromkeys(name for scored in samples for name in scored.values)
    values: dict[str, float | None] = {}
    for name in names:
        counted = [v for scored in samples if (v := scored.values.get(name)) is not None]
        values[name] = sum(counted) / len(counted) if counted else None
    return values


@dataclasses.dataclass(frozen=True)
class Task:
    """An experiment of the paper.

    Attributes:
      name: as in decode.tasks.TASKS.
      form: which wording of the prompts.
      examples: in the order of the data.
      templates: of chat models.
      decoding: the published settings.
      metrics: the first is the one that the paper reports.
      score: texts and their examples to what they are worth, in the same order.
      combine: from the samples of one example to its values.
      judging: what a judge has to say; None if the task needs none.
      choose: answers a multiple-choice example from scores of its letters instead of a text;
        letters without a score are out, and None is no answer. None if the task has no choices.
    """

    name: str
    form: Form
    examples: tuple[Example, ...]
    templates: Templates
    decoding: Decoding
    metrics: tuple[Metric, ...]
    score: Callable[[Sequence[Example], Sequence[str]], list[Scored]]
    combine: Callable[[Sequence[Scored]], Mapping[str, float | None]] = mean_of_samples
    judging: Judging | None = None
    choose: Callable[[Example, Mapping[str, float]], Scored] | None = None

    def __post_init__(self):
        if self.form not in ("published", "clean"):
            raise InputError(f"form {self.form!r} is unknown; use published or clean")
        if not self.examples:
            raise InputError(f"{self.name}: no examples")
        seen: set[str] = set()
        for example in self.examples:
            if example.id in seen:
                raise InputError(f"{self.name}: two examples are called {example.id!r}")
            seen.add(example.id)


def example_id(row: Row, *names: str, default: int | None = None) -> str:
    """Reads the id of an example, a string or a number.

    Args:
      names: of the field; the first that is there and not empty.
      default: where none is.

    Raises:
      InputError: it is something else, or there is none and no default.
    """
    value = next((v for name in names if (v := row.fields.get(name)) not in (None, "")), default)
    finite = isinstance(value, float) and math.isfinite(value)
    if isinstance(value, bool) or not (isinstance(value, str | int) or finite):
        raise InputError(
            f"{row.where}: {names[0]} must be a string or a number, not {shown(value)}"
        )
    return str(value)


def one_by_one(
    score: Callable[[Example, str], Scored],
) -> Callable[[Sequence[Example], Sequence[str]], list[Scored]]:
    """A scorer of many texts from a scorer of one."""

    def score_all(examples: Sequence[Example], texts: Sequence[str]) -> list[Scored]:
        return [score(example, text) for example, text in zip(examples, texts, strict=True)]

    return score_all


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run is worth.

    Attributes:
      task, form: of the task.
      examples: how many were scored.
      completions: their samples.
      metrics: by name, in the task's order; those that no example has a value for are left out.
      groups: the same of each subset: kind, subset, name.
      unjudged: the task has metrics that only a judge can give, and there was none.
    """

    task: str
    form: Form
    examples: int
    completions: int
    metrics: Mapping[str, Estimate]
    groups: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    unjudged: bool

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return dataclasses.asdict(self)


def example_values(
    task: Task, scored: Mapping[str, Sequence[Scored]]
) -> dict[str, Mapping[str, float | None]]:
    """Values of each example by its id; `scored` has its samples, and may lack examples."""
    return {e.id: task.combine(scored[e.id]) for e in task.examples if scored.get(e.id)}


def aggregate(task: Task, scored: Mapping[str, Sequence[Scored]]) -> Report:
    """Makes the report of a run.

    Args:
      scored: by the id of the example, one for each of its samples.

    Raises:
      InputError: nothing was scored.
    """
    values = example_values(task, scored)
    if not values:
        raise InputError(f"{task.name}: nothing to report, no example was scored")
    subsets: dict[str, dict[str, list[str]]] = {}
    for example in task.examples:
        if example.id in values:
            for kind, subset in example.groups.items():
                subsets.setdefault(kind, {}).setdefault(subset, []).append(example.id)

    def estimates(ids: Sequence[str]) -> dict[str, Estimate]:
        found = {}
        for metric in task.metrics:
            counted = [v for i in ids if (v := values[i].get(metric.name)) is not None]
            if counted:
                found[metric.name] = estimate(counted, share=metric.share)
        return found

    whole = estimates(list(values))
    return Report(
        task=task.name,
        form=task.form,
        examples=len(values),
        completions=sum(len(scored[i]) for i in values),
        metrics=whole,
        groups={
            kind: {subset: estimates(ids) for subset, ids in members.items()}
            for kind, members in subsets.items()
        },
        unjudged=task.judging is not None and not _judged(task.judging, values),
    )


def _judged(judging: Judging, values: Mapping[str, Mapping[str, float | None]]) -> bool:
    """Whether every example has the values that a judge gives."""
    names = judging.values(dict.fromkeys(judging.asks, 0.0)).keys()
    return all(value.get(name) is not None for value in values.values() for name in names)
