"""results.json: the figures of every row on every task, and what they say of each other.

Nothing in it depends on when or how often the evaluation was started.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from decode.evaluation.comparison import interval, means, resampled_means
from decode.evaluation.plan import Evaluation, OutputJob, TaskRun
from decode.evaluation.run import FIRST_PROMPT
from decode.evaluation.scoring import Prediction, by_example, predictions
from decode.requests import as_schedule
from decode.tasks import aggregate, example_values, gap_closed
from decode.tasks.task import Metric, Task
from proxy_jax.errors import InputError
from proxy_jax.reading import Fields, read_json

Found = Mapping[Path, Sequence[Prediction]]

_SHOWN = 3  # examples of each kind
_COMPARED = ("base", "expert", "tuned")  # with the proxy


def make_results(
    config: ConfigDict,
    evaluation: Evaluation,
    unfinished: Collection[Path],
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Scores what is finished and puts the figures together, for a JSON file.

    Args:
      config: of the evaluation.
      evaluation: its plan.
      unfinished: directories of jobs that are not yet scored.
      progress: called with the number of completions just scored or judged.

    Raises:
      InputError: a judge that cannot be used.
    """
    found = {
        one.directory: predictions(one, progress)
        for one in evaluation.jobs
        if one.directory not in unfinished
    }
    tasks = {run.task.name: _task_results(evaluation, run, found) for run in evaluation.runs}
    fields = config.to_dict()
    rows = [row for row in evaluation.rows if row != "proxy"]
    return {
        "models": {
            row: fields[row] | {"path": fields[row]["path"] or fields["base"]["path"]}
            for row in rows
        },
        "proxy": {
            name: fields[name]
            for name in ("plan", "alpha", "alpha_schedule", "beta", "base_filter")
        },
        "run": {name: fields[name] for name in ("seed", "batch_size", "mesh")},
        "tasks": tasks,
        "mean_gap_closed": _mean_gap(tasks),
        "unfinished": [
            "/".join(one.directory.parts[-2:])
            for one in evaluation.jobs
            if one.directory in unfinished
        ],
    }


def _task_results(evaluation: Evaluation, run: TaskRun, found: Found) -> dict[str, Any]:
    jobs = {row: evaluation.of(row, run)[0] for row in evaluation.rows}
    rows = {row: found[one.directory] for row, one in jobs.items() if one.directory in found}
    asked = dataclasses.replace(run.task, examples=run.task.examples[: run.asked])
    figures = {row: _row_figures(asked, jobs[row], rows[row]) for row in rows}
    headline = _headline(asked, figures)
    differences, gaps = _comparisons(asked, rows)
    below = next(
        (
            d
            for d in differences
            if headline
            and d["metric"] == headline.name
            and d["to"] == "expert"
            and _is_worse(d["value"], headline)
        ),
        None,
    )
    return {
        "name": run.task.name,
        "form": run.task.form,
        "examples": run.asked,
        "available": len(run.task.examples),
        "letters": run.letters,
        "judge": run.judge,
        "decoding": dataclasses.asdict(run.task.decoding),
        "published_decoding": dict(run.published),
        "metrics": [dataclasses.asdict(metric) for metric in run.task.metrics],
        "headline": headline.name if headline else None,
        "rows": figures,
        "differences": differences,
        "gap_closed": gaps,
        "below_expert": below,
        "sweep": _sweep(evaluation, run, jobs, found),
        "texts": _texts(asked, rows, headline),
    }


def _row_figures(task: Task, job: OutputJob, found: Sequence[Prediction]) -> dict[str, Any]:
    report = aggregate(task, by_example(found)).as_dict()
    figures = {name: report[name] for name in ("metrics", "groups", "unjudged", "completions")}
    lengths = [one.new_tokens for one in found if one.new_tokens is not None]
    if lengths:
        figures["new_tokens"] = sum(lengths) / len(lengths)
        figures["cut"] = sum(one.finish_reason == "length" for one in found) / len(found)
    figures["first_prompt"] = _first_prompt(job)
    figures["templates"] = dict(job.templates)
    return figures


def _first_prompt(job: OutputJob) -> dict[str, str]:
    """What each role read of the first example; nothing if that is lost, and no figure needs it."""
    path = job.directory / FIRST_PROMPT
    try:
        prompt = Fields(str(path), read_json(path))
        return {role: prompt.string(role) for role in job.templates}
    except InputError:
        return {}


def _headline(task: Task, figures: Mapping[str, Any]) -> Metric | None:
    """The first metric that says good or bad and that some row has."""
    for metric in task.metrics:
        if metric.higher_is_better is not None and any(
            metric.name in row["metrics"] for row in figures.values()
        ):
            return metric
    return None


def _is_worse(difference: float | None, metric: Metric) -> bool:
    return difference is not None and (
        difference < 0 if metric.higher_is_better else difference > 0
    )


def _comparisons(
    task: Task, rows: Mapping[str, Sequence[Prediction]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Differences between the proxy and other rows, and the share of the gap that it closes.

    Without a directly tuned model the expert stands in its place, and "to" says so.
    """
    names = [metric for metric in task.metrics if metric.higher_is_better is not None]
    values = {row: example_values(task, by_example(found)) for row, found in rows.items()}
    columns = {
        (row, metric.name): [of[e.id].get(metric.name) for e in task.examples]
        for row, of in values.items()
        for metric in names
    }
    columns = {key: some for key, some in columns.items() if any(v is not None for v in some)}
    if not columns:
        return [], {}
    matrix = np.asarray(list(columns.values()), np.float64)
    mean = dict(zip(columns, means(matrix), strict=True))
    drawn = dict(zip(columns, resampled_means(matrix).T, strict=True))
    each = dict(zip(columns, matrix, strict=True))
    differences, gaps = [], {}
    for metric in names:
        proxy, base = ("proxy", metric.name), ("base", metric.name)
        for row in _COMPARED:
            if {proxy, (row, metric.name)} <= columns.keys():
                other = row, metric.name
                low, high = interval(drawn[proxy] - drawn[other])
                sign = 1 if metric.higher_is_better else -1
                apart = sign * (each[proxy] - each[other])
                differences.append(
                    {
                        "metric": metric.name,
                        "of": "proxy",
                        "to": row,
                        "value": _number(mean[proxy] - mean[other]),
                        "low": _number(low),
                        "high": _number(high),
                        "better": int(np.sum(apart > 0)),
                        "worse": int(np.sum(apart < 0)),
                    }
                )
        to = "tuned" if ("tuned", metric.name) in columns else "expert"
        ceiling = to, metric.name
        if {proxy, base, ceiling} <= columns.keys():
            ends = interval(drawn[ceiling] - drawn[base])
            clear = bool(ends[0] > 0 or ends[1] < 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                shares = (drawn[proxy] - drawn[base]) / (drawn[ceiling] - drawn[base])
            low, high = interval(shares)
            gaps[metric.name] = {
                "to": to,
                "value": _number(gap_closed(mean[base], mean[proxy], mean[ceiling])),
                # A gap that may be none has no share that could be told.
                "low": _number(low) if clear else None,
                "high": _number(high) if clear else None,
                "gap_is_clear": clear,
            }
    return differences, gaps


def _sweep(
    evaluation: Evaluation, run: TaskRun, jobs: Mapping[str, OutputJob], found: Found
) -> dict[str, Any] | None:
    """The metrics at each alpha, and those of the rows on the same examples."""
    if not evaluation.alphas:
        return None
    proxy, *others = evaluation.of("proxy", run)
    own = as_schedule(proxy.alpha)
    by_alpha = {float(one.alpha): one for one in others if not isinstance(one.alpha, tuple)}
    of_alpha = {alpha: by_alpha.get(alpha, proxy) for alpha in evaluation.alphas}
    task = dataclasses.replace(run.task, examples=run.task.examples[: run.swept])

    def metrics(job: OutputJob) -> dict[str, Any]:
        ids = {example.id for example in task.examples}
        scored = {i: s for i, s in by_example(found[job.directory]).items() if i in ids}
        return aggregate(task, scored).as_dict()["metrics"]

    return {
        "examples": run.swept,
        "points": [
            {
                "alpha": alpha,
                "is_proxy_row": as_schedule(alpha) == own,
                "metrics": metrics(job),
            }
            for alpha, job in of_alpha.items()
            if job.directory in found
        ],
        "rows": {
            row: metrics(jobs[row])
            for row in ("base", "expert", "antiexpert", "tuned")
            if row in jobs and jobs[row].directory in found
        },
    }


def _texts(
    task: Task, rows: Mapping[str, Sequence[Prediction]], headline: Metric | None
) -> dict[str, list[dict[str, Any]]]:
    """A few examples with every row's text: where the proxy is better, and where it is worse.

    "gained": better than M; first where it is better than the expert, too. "lost": worse than M or
    the expert. Without a metric, "first": the first examples.
    """
    if "proxy" not in rows:
        return {}
    first = {row: {p.example.id: p for p in reversed(found)} for row, found in rows.items()}
    values = {
        row: {
            name: value.get(headline.name) if headline else None
            for name, value in example_values(task, by_example(found)).items()
        }
        for row, found in rows.items()
    }
    order = [example.id for example in task.examples]

    def lead(example: str, row: str) -> float:
        """How far the proxy is ahead of a row."""
        ours, theirs = values["proxy"][example], values.get(row, {}).get(example)
        if headline is None or ours is None or theirs is None:
            return 0.0
        return ours - theirs if headline.higher_is_better else theirs - ours

    if headline is None:
        shown = {"first": order[:_SHOWN]}
    else:
        gained = [i for i in order if lead(i, "base") > 0]
        gained.sort(key=lambda i: -lead(i, "expert"))
        lost = [i for i in order if min(lead(i, "base"), lead(i, "expert")) < 0]
        shown = {"gained": gained[:_SHOWN], "lost": lost[:_SHOWN]}

    def entry(example: str) -> dict[str, Any]:
        prompt = first["proxy"][example].example.prompt
        return {
            "id": example,
            "prompt": prompt.text + prompt.response_prefix,
            "rows": {
                row: {
                    "text": of[example].text,
                    "extracted": of[example].scored.extracted,
                    "value": values[row][example],
                }
                for row, of in first.items()
            },
        }

    return {kind: [entry(i) for i in ids] for kind, ids in shown.items() if ids}


def _mean_gap(tasks: Mapping[str, Any]) -> dict[str, Any] | None:
    """The mean over tasks of the share closed by their headline metric; of tuned models only."""
    shares = {}
    for name, task in tasks.items():
        gap = task["gap_closed"].get(task["headline"])
        if gap and gap["to"] == "tuned" and gap["value"] is not None:
            shares[name] = gap["value"]
    if len(shares) < 2:
        return None
    return {"value": sum(shares.values()) / len(shares), "tasks": list(shares)}


def _number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None
