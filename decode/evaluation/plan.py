"""What an evaluation decodes: a trio's rows on tasks, and the sweep over alpha.

A row is a model alone (M, M+, M-, a directly tuned M) or the proxy. Each writes the completions of
each task to a directory of its own, as decode.generate does, and so does each alpha of the sweep:

    OUTPUT_DIR/gsm/base/        outputs.jsonl, manifest.json (what the texts depend on)
    OUTPUT_DIR/gsm/proxy/
    OUTPUT_DIR/gsm/alpha_0.5/

The sweep takes the proxy's own alpha from the proxy's row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.defaults import decoding
from decode.job import model_specs, resolved
from decode.outputs import RENDERED, Output, OutputFile, open_output
from decode.requests import Schedule, as_schedule
from decode.tasks import Example, Task, load_judge, load_task
from proxy_jax.errors import InputError
from proxy_jax.rows import local_path
from proxy_jax.tokenization import Prompt, Template
from proxy_jax.trio import ROLES, identify

ROWS = (*ROLES, "proxy", "tuned")
# Fields of the config that hold for every row, and those of the proxy alone.
_RUN = ("seed", "eos_ids", "batch_size", "chunk_steps", "mesh", "replicate", "layers")
_COMBINED = ("plan", "alpha", "alpha_schedule", "beta", "base_filter")


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """A task as an evaluation sets it.

    Attributes:
      task: with the decoding settings that hold.
      published: the task's own decoding settings.
      asked: how many of its examples, the first ones.
      swept: how many of those the sweep takes.
      letters: examples are answered by the likeliest letter.
      judge: its name; empty for none.
    """

    task: Task
    published: Mapping[str, Any]
    asked: int
    swept: int
    letters: bool
    judge: str


@dataclasses.dataclass(frozen=True)
class OutputJob:
    """One output file: a row, or one alpha of the sweep, on a task.

    Attributes:
      run: of which task.
      row: one of ROWS.
      number: 0 for a row; for the sweep, the place of its alpha from 1. Completions of a job are
        drawn with randomness of their own.
      alpha: coefficient, of the proxy and the sweep.
      directory: of the file.
      examples: of the task, or the first of them.
      prompts: one an example, as the row's models read them.
      templates: of the row's models, by role.
      texts: the prompts' texts by completion, of all the data: more can be asked later.
      settings, inputs: what the completions depend on, for the manifest; all the data's prompts
        among it.
    """

    run: TaskRun
    row: str
    number: int
    alpha: float | Schedule
    directory: Path
    examples: Sequence[Example]
    prompts: Sequence[Prompt]
    templates: Mapping[str, str]
    texts: Sequence[str]
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]

    @property
    def completions(self) -> int:
        """How many the file has in the end."""
        return len(self.examples) * self.run.task.decoding.samples

    @property
    def outputs(self) -> Path:
        """The file."""
        return self.directory / "outputs.jsonl"

    def waiting(self) -> int:
        """Completions that are not yet there.

        Raises:
          InputError: the directory has the output of another job.
        """
        if not self.outputs.exists():
            return self.completions
        given = self.directory, dict(self.settings), dict(self.inputs), self.texts
        try:
            with contextlib.closing(OutputFile(*given, write=False)) as output:
                return len(set(range(self.completions)) - output.done)
        except InputError:
            if self.settings["overwrite"]:
                return self.completions
            raise

    def open(self, first_prompt: Mapping[str, Sequence[int]]) -> Output:
        """The file, to write what is missing.

        Args:
          first_prompt: what each role reads of the first example: a template may change with the
            day.
        """
        inputs = {
            **self.inputs,
            RENDERED: _digest({r: list(ids) for r, ids in first_prompt.items()}),
        }
        return open_output(self.directory, dict(self.settings), inputs, self.texts)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that is to be done.

    Attributes:
      directory: of the output.
      runs: the tasks.
      rows: of ROWS, those that the config has models for.
      jobs: the files of every row on every task, and of the sweep.
      alphas: of the sweep; the proxy's own among them has no job.
    """

    directory: Path
    runs: Sequence[TaskRun]
    rows: Sequence[str]
    jobs: Sequence[OutputJob]
    alphas: Sequence[float]

    def of(self, row: str, run: TaskRun) -> list[OutputJob]:
        """A row's jobs on a task: its own, and after the proxy's those of the sweep."""
        return [one for one in self.jobs if one.row == row and one.run is run]


def plan_evaluation(config: ConfigDict) -> Evaluation:
    """Reads the tasks' data and lays out the work. Opens no model.

    Raises:
      InputError: data that cannot be used, or a config that does not add up.
    """
    if not config.output_dir:
        raise InputError("output_dir is empty: where does the report go?")
    for role in ("base", "expert"):
        if not config[role].path:
            raise InputError(f"{role}.path is empty: an evaluation compares M, M+ and the proxy")
    if not config.tasks:
        raise InputError("tasks is empty: what is evaluated?")
    directory = local_path(config.output_dir)
    alphas = _check_sweep(config)
    runs = [_task_run(name, config.tasks[name], config.sweep.limit) for name in config.tasks]
    rows = [row for row in ROWS if row == "proxy" or _has_model(config, row)]
    jobs = []
    for run in runs:
        for row in rows:
            jobs.append(_job(config, directory, run, row))
            if row == "proxy":
                jobs += [
                    _sweep_job(jobs[-1], number, alpha)
                    for number, alpha in enumerate(alphas, 1)
                    if as_schedule(alpha) != as_schedule(jobs[-1].alpha)
                ]
    return Evaluation(directory, runs, rows, jobs, alphas)


def _check_sweep(config: ConfigDict) -> tuple[float, ...]:
    alphas = tuple(config.sweep.alphas)
    for alpha in alphas:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise InputError(f"sweep.alphas: {alpha!r} is not a number")
        as_schedule(alpha, "sweep.alphas")
    if len({f"{float(alpha):g}" for alpha in alphas}) < len(alphas):  # names of directories
        raise InputError(f"sweep.alphas: one is there twice, to six digits, in {alphas}")
    if config.sweep.limit < 0:
        raise InputError(f"sweep.limit must be at least 0, not {config.sweep.limit}")
    return tuple(sorted(float(alpha) for alpha in alphas))


def _task_run(name: str, part: ConfigDict, swept: int) -> TaskRun:
    for field in ("limit", "max_new_tokens", "samples"):
        if part[field] < 0:
            raise InputError(f"tasks.{name}.{field} must be at least 0, not {part[field]}")
    task = load_task(name, part.data, part.form)
    if part.letters and task.choose is None:
        raise InputError(f"tasks.{name}.letters: {name} has no choices")
    if part.judge:
        if task.judging is None:
            raise InputError(f"tasks.{name}.judge: {name} needs no judge")
        load_judge(part.judge)
    changed = {field: part[field] for field in ("max_new_tokens", "samples") if part[field]}
    if part.letters:
        changed["samples"] = 1
    asked = min(part.limit or len(task.examples), len(task.examples))
    return TaskRun(
        task=dataclasses.replace(task, decoding=dataclasses.replace(task.decoding, **changed)),
        published=dataclasses.asdict(task.decoding),
        asked=asked,
        swept=min(swept or asked, asked),
        letters=part.letters,
        judge=part.judge,
    )


def _job(config: ConfigDict, directory: Path, run: TaskRun, row: str) -> OutputJob:
    """A row's job on a task."""
    own, task = decoding_config(config, row), run.task
    alone = row != "proxy"
    templates = {}
    for role in ROLES:
        if own[role].path:
            given = config[row if alone else role].template
            of_task = task.templates.alone if alone else task.templates.expert
            templates[role] = of_task if given == "task" else given
    chat = alone and templates["base"] != "raw"
    prompts = [example.chat_prompt if chat else example.prompt for example in task.examples]
    if not any(Template(template).has_system for template in templates.values()):
        prompts = [dataclasses.replace(prompt, system="") for prompt in prompts]
    fields = resolved(own)
    settings = {
        "task": task.name,
        "form": task.form,
        "letters": run.letters,
        "models": {role: fields[role] | {"template": spec} for role, spec in templates.items()},
        "decoding": dataclasses.asdict(task.decoding),
        **{name: fields[name] for name in (*_RUN, *(() if alone else _COMBINED))},
        "overwrite": config.overwrite,
    }
    content = [[e.id, dataclasses.asdict(p)] for e, p in zip(task.examples, prompts, strict=True)]
    return OutputJob(
        run=run,
        row=row,
        number=0,
        alpha=own.alpha_schedule or own.alpha,
        directory=directory / task.name / row,
        examples=task.examples[: run.asked],
        prompts=prompts[: run.asked],
        templates=templates,
        texts=[prompt.text for prompt in prompts for _ in range(task.decoding.samples)],
        settings=settings,
        inputs={"prompts": _digest(content), **identify(model_specs(own))},
    )


def _sweep_job(proxy: OutputJob, number: int, alpha: float) -> OutputJob:
    return dataclasses.replace(
        proxy,
        number=number,
        alpha=alpha,
        directory=proxy.directory.with_name(f"alpha_{alpha:g}"),
        examples=proxy.examples[: proxy.run.swept],
        prompts=proxy.prompts[: proxy.run.swept],
        settings={**proxy.settings, "alpha": alpha, "alpha_schedule": ()},
    )


def decoding_config(config: ConfigDict, row: str) -> ConfigDict:
    """A decoding job with the models of a row; their templates are each task's matter."""
    own, given = decoding(), config.copy_and_resolve_references()
    for name in _RUN:
        own[name] = given[name]
    if row == "proxy":
        for name in (*ROLES, *_COMBINED):
            own[name] = given[name]
    else:
        own.method = "base"
        own.base = given[row]
        own.base.path = given[row].path or given.base.path
    for role in ROLES:
        own[role].template = "raw"
    return own


def _has_model(config: ConfigDict, row: str) -> bool:
    return bool(config[row].path or config[row].adapter)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
