"""The report of an evaluation: whether, where and by how much the proxy helped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import manifest
from decode.evaluation.document import (
    Block,
    Cards,
    Cell,
    Figure,
    Folded,
    Heading,
    Note,
    Paragraph,
    Table,
    Text,
    to_html,
    to_markdown,
)
from decode.evaluation.plots import LABELS, on_white, percent, plot_rows, plot_sweep

_MODELS = ("base", "expert", "antiexpert", "tuned")
_LONGEST = 1200  # characters of a text that are shown
_CEILINGS = {"tuned": "the directly tuned M", "expert": "the expert alone"}


def write_report(
    directory: Path, results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]
) -> None:
    """Writes report.md, report.html and plots/*.svg.

    Args:
      directory: where to.
      results: the content of results.json.
      runs: see `make_report`.
    """
    blocks = make_report(results, runs)
    plots = directory / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Figure):
            manifest.replace(plots / f"{block.name}.svg", on_white(block.svg).encode())
    page = to_html(blocks, _title(results))
    manifest.replace(directory / "report.html", page.encode())
    manifest.replace(directory / "report.md", to_markdown(blocks, "plots").encode())


def make_report(results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The report's page.

    Args:
      results: the content of results.json.
      runs: what decoded each row of each task: "task", "row", "device", "commit", "versions",
        "tokens_per_second"; the last may be None.
    """
    tasks = results["tasks"].values()
    blocks: list[Block] = [Heading(_title(results), 1), Paragraph(_what(results))]
    if results["unfinished"]:
        names = ", ".join(results["unfinished"])
        blocks.append(Note("note", f"Not finished: {names}. The same command goes on."))
    blocks += [Note("warning", text) for task in tasks if (text := below_expert(task))]
    if len(results["tasks"]) > 1:
        blocks += [Heading("All tasks"), _summary(results)]
        if mean := results["mean_gap_closed"]:
            blocks.append(
                Paragraph(
                    f"Mean share of the gap closed: {percent(mean['value'])} "
                    f"({', '.join(mean['tasks'])})."
                )
            )
    for task in tasks:
        blocks += _task(task, results)
    blocks += [Heading("Models and run"), _models(results), _run(results)]
    if runs:
        blocks += [Heading("Where it ran", 3), _machines(runs)]
    blocks.append(Folded("How to read the figures", [Paragraph(text) for text in _READING]))
    return blocks


def below_expert(task: Mapping[str, Any]) -> str:
    """The warning that the proxy is below its expert alone; empty if it is not."""
    difference = task["below_expert"]
    if difference is None:
        return ""
    name = difference["metric"]
    proxy, expert = (task["rows"][row]["metrics"][name]["value"] for row in ("proxy", "expert"))
    text = (
        f"{task['name']}: the proxy is worse than its expert alone, {percent(proxy)} against "
        f"{percent(expert)} {_words(name)} ({_difference(difference)}). "
        "The expert alone is smaller and faster."
    )
    return text + (_unsettled(task) if _undecided(difference) else "")


def _title(results: Mapping[str, Any]) -> str:
    base, expert = (_name(results["models"][role]) for role in ("base", "expert"))
    return f"{base}, proxy-tuned by {expert}"


def _what(results: Mapping[str, Any]) -> str:
    names = {role: _name(model) for role, model in results["models"].items()}
    anti = f", M− {names['antiexpert']}" if "antiexpert" in names else ""
    formula = "s(M) + alpha (s(M+) − s(M−))" if anti else "s(M) + alpha (s(M+) − s(M))"
    return (
        f"M is {names['base']}, M+ {names['expert']}{anti}. The proxy draws from the softmax of "
        f"{formula} with {_alpha(results)}."
    )


def _summary(results: Mapping[str, Any]) -> Table:
    rows = [row for row in LABELS if any(row in t["rows"] for t in results["tasks"].values())]
    lines: list[list[str | Cell]] = []
    for task in results["tasks"].values():
        name = task["headline"]
        metric = _metrics(task).get(name)
        found = [task["rows"].get(row, {}).get("metrics", {}).get(name) for row in rows]
        figures = [_plain(one["value"], metric) if one and metric else "" for one in found]
        gap, share = task["gap_closed"].get(name), ""
        if gap and gap["value"] is not None:
            share = percent(gap["value"]) + (" (to M+)" if gap["to"] == "expert" else "")
        lines.append([task["name"], _words(name) if name else "unjudged", *figures, share])
    return Table(["task", "metric", *(LABELS[row] for row in rows), "gap closed"], lines, texts=2)


def _task(task: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Block]:
    metrics = _metrics(task)
    missing = [name for name in metrics if not any(name in r["metrics"] for r in _rows(task))]
    yield Heading(task["name"])
    if any(row["unjudged"] for row in _rows(task)):
        yield Note(
            "note",
            f"Unjudged: {', '.join(map(_words, missing))} can only be said by a judge, and none "
            f"was set. All texts are kept, in {task['name']}/ROW/predictions.jsonl; "
            f"tasks.{task['name']}.judge in the config names one (decode/tasks/judges.py), and "
            "nothing is decoded again.",
        )
    if cards := _cards(task):
        yield Cards(cards)
    yield from map(Paragraph, _verdict(task))
    if svg := plot_rows(task):
        yield Figure(
            f"{task['name']}-rows",
            svg,
            "Each row with its 95 % interval; the broken line is the expert alone.",
        )
    if task["rows"]:
        yield _row_table(task, results)
    if task["differences"]:
        yield Heading("The proxy against the other rows", 3)
        yield _difference_table(task)
    if task["gap_closed"]:
        yield _gap_table(task)
    yield from _sweep(task)
    yield from _groups(task)
    yield from _examples(task)
    yield from _prompts(task)
    yield Folded("Settings", [_settings(task)])


def _cards(task: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    name = task["headline"]
    if not name:
        return []
    labels = {"proxy": "proxy", "base": "M", "expert": "M+ alone", "tuned": "M tuned directly"}
    cards = []
    for row, label in labels.items():
        if found := task["rows"].get(row, {}).get("metrics", {}).get(name):
            cards.append((label, percent(found["value"]), _words(name)))
    gap = task["gap_closed"].get(name)
    if gap and gap["value"] is not None:
        cards.append(("gap closed", percent(gap["value"]), _to(gap)))
    return cards


def _verdict(task: Mapping[str, Any]) -> Iterator[str]:
    """What the headline metric says, in sentences."""
    name = task["headline"]
    against = {d["to"]: d for d in task["differences"] if d["metric"] == name}
    for row, other in (("base", "M"), ("expert", "the expert alone")):
        if difference := against.get(row):
            text = (
                f"{_words(name).capitalize()}, the proxy against {other}: "
                f"{_difference(difference)}; better on {difference['better']} examples, worse on "
                f"{difference['worse']}."
            )
            yield text + (_unsettled(task) if _undecided(difference) else "")
    gap = task["gap_closed"].get(name)
    if gap is None:
        return
    text = f"Of the gap between M and {_CEILINGS[gap['to']]} it closes {_share(gap)}."
    if gap["to"] == "expert":
        text += " (No directly tuned M is among the rows; the expert alone stands in its place.)"
    yield text + ("" if gap["gap_is_clear"] else _unsettled(task, "whether there is a gap"))


def _unsettled(task: Mapping[str, Any], what: str = "which is ahead") -> str:
    return f" {task['examples']} examples do not settle {what}."


def _row_table(task: Mapping[str, Any], results: Mapping[str, Any]) -> Table:
    metrics = _metrics(task)
    shown = [name for name in metrics if any(name in row["metrics"] for row in _rows(task))]
    lengths = any("new_tokens" in row for row in _rows(task))
    header = ["row", "model", *map(_words, shown), *(["new tokens", "cut off"] if lengths else [])]
    lines: list[list[str | Cell]] = []
    for row, figures in task["rows"].items():
        model = results["models"].get(row)
        line: list[str | Cell] = [
            Cell(LABELS[row], row=row),
            _name(model) if model else _alpha(results),
            *(_estimate(figures, metrics[name]) for name in shown),
        ]
        if lengths:
            line += [f"{figures['new_tokens']:.0f}", percent(figures["cut"], 0)]
        lines.append(line)
    strong = list(task["rows"]).index("proxy") if "proxy" in task["rows"] else None
    return Table(header, lines, texts=2, strong=strong)


def _difference_table(task: Mapping[str, Any]) -> Table:
    metrics = _metrics(task)
    lines: list[list[str | Cell]] = [
        [
            _words(d["metric"]),
            Cell(LABELS[d["to"]], row=d["to"]),
            _signed(d["value"], metrics[d["metric"]]),
            _span(d, metrics[d["metric"]]),
            str(d["better"]),
            str(d["worse"]),
        ]
        for d in task["differences"]
    ]
    header = ["metric", "against", "points", "95 % interval", "better on", "worse on"]
    return Table(header, lines, texts=2)


def _gap_table(task: Mapping[str, Any]) -> Table:
    lines: list[list[str | Cell]] = [
        [
            _words(name),
            _to(gap),
            "undefined" if gap["value"] is None else percent(gap["value"]),
            _gap_span(gap) or "none",
        ]
        for name, gap in task["gap_closed"].items()
    ]
    return Table(["metric", "gap", "closed", "95 % interval"], lines, texts=2)


def _sweep(task: Mapping[str, Any]) -> Iterator[Block]:
    sweep = task["sweep"]
    if not sweep or not sweep["points"]:
        return
    metrics = _metrics(task)
    shown = [name for name in metrics if any(name in p["metrics"] for p in sweep["points"])]
    if not shown:
        return
    yield Heading(f"Sweep over alpha, {sweep['examples']} examples", 3)
    if svg := plot_sweep(task):
        yield Figure(
            f"{task['name']}-sweep",
            svg,
            "By alpha, with the 95 % interval; broken lines are the rows on the same examples.",
        )
    lines: list[list[str | Cell]] = [
        [f"{point['alpha']:g}", *(_estimate(point, metrics[name]) for name in shown)]
        for point in sweep["points"]
    ]
    own = [i for i, point in enumerate(sweep["points"]) if point["is_proxy_row"]]
    yield Table(["alpha", *map(_words, shown)], lines, strong=own[0] if own else None)
    if (name := task["headline"]) in shown:
        sign = 1 if metrics[name]["higher_is_better"] else -1
        best = max(sweep["points"], key=lambda point: sign * point["metrics"][name]["value"])
        yield Paragraph(
            f"Best of these is alpha = {best['alpha']:g}. It is chosen on these examples, and will "
            "look better on them than on others."
        )


def _groups(task: Mapping[str, Any]) -> Iterator[Block]:
    """The headline metric of each subset."""
    metric = _metrics(task).get(task["headline"])
    kinds = list(dict.fromkeys(kind for row in _rows(task) for kind in row["groups"]))
    for kind in kinds if metric else ():
        by_row = {row: figures["groups"].get(kind, {}) for row, figures in task["rows"].items()}
        subsets = list(dict.fromkeys(name for found in by_row.values() for name in found))
        lines: list[list[str | Cell]] = []
        for subset in subsets:
            cells = []
            for found in by_row.values():
                value = found.get(subset, {}).get(task["headline"])
                cells.append(_plain(value["value"], metric) if value and metric else "")
            lines.append([subset.replace("_", " "), *cells])
        yield Heading(f"By {kind}", 3)
        yield Table([kind, *(LABELS[row] for row in by_row)], lines)


def _examples(task: Mapping[str, Any]) -> Iterator[Block]:
    titles = {
        "gained": "Examples on which the proxy is better than M",
        "lost": "Examples on which the proxy is worse than M or than its expert",
        "first": "The first examples",
    }
    for kind, entries in task["texts"].items():
        blocks: list[Block] = []
        for entry in entries:
            blocks.append(Text(f"example {entry['id']}", _shortened(entry["prompt"])))
            for row, said in entry["rows"].items():
                value = "" if said["value"] is None else f", {task['headline']} {said['value']:g}"
                found = said["extracted"]
                taken = f", read as {found!r}" if len(found) <= 40 and found != said["text"] else ""
                blocks.append(
                    Text(f"{LABELS[row]}{_words(value)}{taken}", _shortened(said["text"]), row)
                )
        yield Folded(titles[kind], blocks)


def _prompts(task: Mapping[str, Any]) -> Iterator[Block]:
    """What each model reads of the first example; equal texts are shown once."""
    readers: dict[str, list[str]] = {}
    for row, figures in task["rows"].items():
        for role, text in figures["first_prompt"].items():
            template = figures["templates"][role]
            who = f"{LABELS[role]} in the proxy" if row == "proxy" else f"{LABELS[row]} alone"
            readers.setdefault(text, []).append(f"{who} ({template})" if template != "raw" else who)
    blocks = [Text(", ".join(who), text) for text, who in readers.items()]
    if blocks:
        yield Folded("What each model reads, of the first example", blocks)


def _settings(task: Mapping[str, Any]) -> Table:
    decoding, published = task["decoding"], task["published_decoding"]
    lines: list[list[str | Cell]] = [
        ["prompts", task["form"]],
        ["examples", f"{task['examples']:,} of {task['available']:,}"],
        ["answered by", "the likeliest letter" if task["letters"] else "text"],
        ["judge", task["judge"] or "none"],
    ]
    for name, value in decoding.items():
        changed = f"(published: {published[name]})" if published[name] != value else ""
        if name == "temperature" and value is None:
            value = "greedy"
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(repr, value))
        if value not in (None, ""):
            lines.append([_words(name), Cell(str(value), changed)])
    return Table(["setting", "value"], lines, texts=2)


def _models(results: Mapping[str, Any]) -> Table:
    lines: list[list[str | Cell]] = [
        [
            Cell(LABELS[row], row=row),
            results["models"][row]["path"],
            results["models"][row]["adapter"] or "none",
            results["models"][row]["dtype"],
            results["models"][row]["template"],
        ]
        for row in _MODELS
        if row in results["models"]
    ]
    return Table(["", "model", "adapter", "dtype", "template"], lines, texts=5)


def _run(results: Mapping[str, Any]) -> Table:
    proxy, run = results["proxy"], results["run"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in run["mesh"].items())
    kept = [f"{name} {proxy['base_filter'][name]:g}" for name, none in (("top_p", 1), ("min_p", 0))
            if proxy["base_filter"][name] != none]  # fmt: skip
    lines: list[list[str | Cell]] = [
        ["alpha", _alpha(results).removeprefix("alpha = ")],
        ["beta", f"{proxy['beta']:g}"],
        ["filter on M", ", ".join(kept) or "none"],
        ["plan", proxy["plan"]],
        ["batch size", str(run["batch_size"])],
        ["mesh", mesh],
        ["seed", str(run["seed"])],
    ]
    return Table(["proxy and run", ""], lines, texts=2)


def _machines(runs: Sequence[Mapping[str, Any]]) -> Table:
    lines: list[list[str | Cell]] = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        speed = run["tokens_per_second"]
        lines.append(
            [
                Cell(LABELS.get(run["row"], run["row"]), run["task"]),
                run["device"],
                _commit(run["commit"]),
                versions,
                f"{speed:,.1f}" if speed else "",
            ]
        )
    return Table(["row", "device", "commit", "versions", "tokens/s"], lines, texts=4)


def _commit(commit: str | None) -> str:
    if commit is None:
        return ""
    name, _, changed = commit.partition("+")
    return f"{name[:10]}{' and changes' if changed else ''}"


def _rows(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(task["rows"].values())


def _metrics(task: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {metric["name"]: metric for metric in task["metrics"]}


def _name(model: Mapping[str, Any]) -> str:
    """What people call a model: the end of its path."""
    name = model["path"].rstrip("/").split("/")[-1].removesuffix(".gguf")
    return f"{name} + adapter" if model["adapter"] else name


def _alpha(results: Mapping[str, Any]) -> str:
    if schedule := results["proxy"]["alpha_schedule"]:
        return "alpha = " + ", ".join(f"{value:g} from token {start}" for start, value in schedule)
    return f"alpha = {results['proxy']['alpha']:g}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: float, metric: Mapping[str, Any]) -> str:
    return percent(value) if metric["share"] else f"{value:,.1f}"


def _estimate(figures: Mapping[str, Any], metric: Mapping[str, Any] | None) -> str | Cell:
    """A metric's value and interval among figures that may lack it."""
    found = figures.get("metrics", {}).get(metric["name"]) if metric else None
    if not found:
        return ""
    assert metric is not None
    if found["low"] is None:
        return _plain(found["value"], metric)
    scale = 100 if metric["share"] else 1
    return Cell(
        _plain(found["value"], metric),
        f"[{scale * found['low']:.1f}, {scale * found['high']:.1f}]",
    )


def _signed(value: float | None, metric: Mapping[str, Any]) -> str:
    if value is None:
        return ""
    return f"{100 * value if metric['share'] else value:+,.1f}".replace("-", "−")


def _span(difference: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    if difference["low"] is None:
        return ""
    return f"{_signed(difference['low'], metric)} to {_signed(difference['high'], metric)}"


def _difference(difference: Mapping[str, Any]) -> str:
    """A difference of shares in words."""
    share = {"share": True}
    span = _span(difference, share)
    return f"{_signed(difference['value'], share)} points, 95 % interval {span}"


def _undecided(difference: Mapping[str, Any]) -> bool:
    return difference["low"] is None or difference["low"] <= 0 <= difference["high"]


def _share(gap: Mapping[str, Any]) -> str:
    if gap["value"] is None:
        return "a share that is undefined, for there is none"
    span = _gap_span(gap)
    return f"{percent(gap['value'])} (95 % interval {span})" if span else percent(gap["value"])


def _gap_span(gap: Mapping[str, Any]) -> str:
    if gap["low"] is None:
        return ""
    return f"{percent(gap['low'])} to {percent(gap['high'])}".replace("-", "−")


def _to(gap: Mapping[str, Any]) -> str:
    return f"M to {_CEILINGS[gap['to']]}"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [...]"


_READING = (
    "Intervals of one row are Wilson's score intervals for shares and normal ones otherwise. "
    "Intervals of differences and of the gap closed come from 10,000 resamples of the examples, "
    "the same for every row (paired bootstrap, percentiles). They say how far other examples of "
    "the kind would move the figures, not how far another training run or prompt would.",
    "Gap closed is (proxy − M) / (tuned − M). Above 100 % the proxy is better than the directly "
    "tuned model. Without one the expert alone takes its place, and the figure says so. Where the "
    "interval of tuned − M holds 0, the share has no interval.",
    "Better on, worse on: examples on which the proxy's value is above or below the other row's, "
    "in the sense of the metric.",
    "Cut off: texts that reached the most new tokens. New tokens: their mean number.",
)
