"""The tables of a report, each from a part of results.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from decode.evaluation import wording
from decode.evaluation.document import Cell, Table
from decode.evaluation.wording import LABELS, percent, words

_MODELS = ("base", "expert", "antiexpert", "tuned")
_Line = list[str | Cell]


def metrics_of(task: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A task's metrics by name."""
    return {metric["name"]: metric for metric in task["metrics"]}


def summary(tasks: Sequence[Mapping[str, Any]]) -> Table:
    """The headline metric of each task for every row, and the gap closed."""
    rows = [row for row in LABELS if any(row in task["rows"] for task in tasks)]
    lines: list[_Line] = []
    for task in tasks:
        name = task["headline"]
        metric = metrics_of(task).get(name)
        found = [task["rows"].get(row, {}).get("metrics", {}).get(name) for row in rows]
        figures = [wording.value(one["value"], metric) if one and metric else "" for one in found]
        gap, share = task["gap_closed"].get(name), ""
        if gap and gap["value"] is not None:
            share = percent(gap["value"]) + (" (to M+)" if gap["to"] == "expert" else "")
        lines.append([task["name"], words(name) if name else "unjudged", *figures, share])
    return Table(["task", "metric", *(LABELS[row] for row in rows), "gap closed"], lines, texts=2)


def rows(task: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    """Every row's metrics."""
    metrics, found = metrics_of(task), task["rows"].values()
    shown = [name for name in metrics if any(name in row["metrics"] for row in found)]
    lengths = any("new_tokens" in row for row in found)
    names = wording.model_names(results["models"])
    header = ["row", "model", *map(words, shown), *(["new tokens", "cut off"] if lengths else [])]
    lines: list[_Line] = []
    for row, figures in task["rows"].items():
        line: _Line = [
            Cell(LABELS[row], row=row),
            names.get(row) or wording.alpha(results["proxy"]),
            *(_estimate(figures, metrics[name]) for name in shown),
        ]
        if lengths:
            line += [f"{figures['new_tokens']:.0f}", percent(figures["cut"], 0)]
        lines.append(line)
    strong = list(task["rows"]).index("proxy") if "proxy" in task["rows"] else None
    return Table(header, lines, texts=2, strong=strong)


def differences(task: Mapping[str, Any]) -> Table:
    """The proxy against other rows."""
    metrics = metrics_of(task)
    lines: list[_Line] = [
        [
            words(one["metric"]),
            Cell(LABELS[one["to"]], row=one["to"]),
            wording.signed(one["value"], metrics[one["metric"]]),
            wording.span(one, metrics[one["metric"]]),
            str(one["better"]),
            str(one["worse"]),
        ]
        for one in task["differences"]
    ]
    header = ["metric", "against", "points", "95 % interval", "better on", "worse on"]
    return Table(header, lines, texts=2)


def gaps(task: Mapping[str, Any]) -> Table:
    """The share of the gap that is closed, by metric."""
    lines: list[_Line] = [
        [
            words(name),
            wording.gap_name(gap),
            "undefined" if gap["value"] is None else percent(gap["value"]),
            wording.gap_span(gap) or "none",
        ]
        for name, gap in task["gap_closed"].items()
    ]
    return Table(["metric", "gap", "closed", "95 % interval"], lines, texts=2)


def sweep(task: Mapping[str, Any], shown: Sequence[str]) -> Table:
    """The metrics `shown` at each alpha; the proxy's own is stressed."""
    metrics, points = metrics_of(task), task["sweep"]["points"]
    lines: list[_Line] = [
        [f"{point['alpha']:g}", *(_estimate(point, metrics[name]) for name in shown)]
        for point in points
    ]
    own = [i for i, point in enumerate(points) if point["is_proxy_row"]]
    return Table(["alpha", *map(words, shown)], lines, strong=own[0] if own else None)


def groups(task: Mapping[str, Any]) -> Iterator[Table]:
    """The headline metric of each subset, a table a kind of subset."""
    metric = metrics_of(task).get(task["headline"])
    if metric is None:
        return
    found = task["rows"].values()
    for kind in dict.fromkeys(kind for row in found for kind in row["groups"]):
        by_row = {row: figures["groups"].get(kind, {}) for row, figures in task["rows"].items()}
        lines: list[_Line] = []
        for subset in dict.fromkeys(name for of in by_row.values() for name in of):
            estimates = [of.get(subset, {}).get(task["headline"]) for of in by_row.values()]
            cells = [wording.value(one["value"], metric) if one else "" for one in estimates]
            lines.append([words(subset), *cells])
        yield Table([kind, *(LABELS[row] for row in by_row)], lines)


def settings(task: Mapping[str, Any]) -> Table:
    """How a task was asked and decoded, and where that is not the published way."""
    decoding, published = task["decoding"], task["published_decoding"]
    lines: list[_Line] = [
        ["prompts", task["form"]],
        ["examples", f"{task['examples']:,} of {task['available']:,}"],
        ["answered by", "the likeliest letter" if task["letters"] else "text"],
        ["judge", task["judge"] or "none"],
    ]
    for name, setting in decoding.items():
        changed = f"(published: {published[name]})" if published[name] != setting else ""
        if name == "temperature" and setting is None:
            setting = "greedy"
        if isinstance(setting, (list, tuple)):
            setting = ", ".join(map(repr, setting))
        if setting not in (None, ""):
            lines.append([words(name), Cell(str(setting), changed)])
    return Table(["setting", "value"], lines, texts=2)


def models(results: Mapping[str, Any]) -> Table:
    """Where the models are."""
    lines: list[_Line] = [
        [
            Cell(LABELS[row], row=row),
            results["models"][row]["path"],
            results["models"][row]["adapter"] or "none",
            results["models"][row]["quantize"] or results["models"][row]["dtype"],
            results["models"][row]["template"],
        ]
        for row in _MODELS
        if row in results["models"]
    ]
    return Table(["", "model", "adapter", "dtype", "template"], lines, texts=5)


def run(results: Mapping[str, Any]) -> Table:
    """What holds for the proxy, and for every row."""
    proxy, given = results["proxy"], results["run"]
    base_filter = proxy["base_filter"]
    kept = [
        f"{name} {base_filter[name]:g}"
        for name, none in (("top_p", 1), ("min_p", 0))
        if base_filter[name] != none
    ]
    lines: list[_Line] = [
        ["alpha", wording.alpha(proxy).removeprefix("alpha = ")],
        ["beta", f"{proxy['beta']:g}"],
        ["filter on M", ", ".join(kept) or "none"],
        ["plan", proxy["plan"]],
        ["batch size", str(given["batch_size"])],
        ["mesh", " x ".join(f"{axis} {size}" for axis, size in given["mesh"].items())],
        ["seed", str(given["seed"])],
    ]
    return Table(["proxy and run", ""], lines, texts=2)


def machines(runs: Sequence[Mapping[str, Any]]) -> Table:
    """What decoded each row."""
    lines: list[_Line] = []
    for one in runs:
        speed = one["tokens_per_second"]
        lines.append(
            [
                Cell(LABELS[one["row"]], one["task"]),
                one["device"],
                _commit(one["commit"]),
                ", ".join(f"{name} {version}" for name, version in one["versions"].items()),
                f"{speed:,.1f}" if speed else "",
            ]
        )
    return Table(["row", "device", "commit", "versions", "tokens/s"], lines, texts=4)


def _commit(commit: str | None) -> str:
    if commit is None:
        return ""
    name, _, changed = commit.partition("+")
    return f"{name[:10]}{' and changes' if changed else ''}"


def _estimate(figures: Mapping[str, Any], metric: Mapping[str, Any]) -> str | Cell:
    """A metric's value and interval among figures that may lack it."""
    found = figures["metrics"].get(metric["name"])
    if not found:
        return ""
    text = wording.value(found["value"], metric)
    if found["low"] is None:
        return text
    scale = 100 if metric["share"] else 1
    return Cell(text, f"[{scale * found['low']:.1f}, {scale * found['high']:.1f}]")
