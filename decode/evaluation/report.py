"""The report of an evaluation: whether, where and by how much the proxy helped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from decode.evaluation import tables, wording
from decode.evaluation.document import (
    Block,
    Cards,
    Figure,
    Folded,
    Heading,
    Note,
    Paragraph,
    Text,
    to_html,
    to_markdown,
)
from decode.evaluation.plots import on_white, plot_rows, plot_sweep
from decode.evaluation.wording import LABELS, below_expert, percent, words
from proxy_jax.jobs import files

_LONGEST = 1200  # characters of a text that are shown


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
            files.replace(plots / f"{block.name}.svg", on_white(block.svg).encode())
    page = to_html(blocks, _title(results))
    files.replace(directory / "report.html", page.encode())
    files.replace(directory / "report.md", to_markdown(blocks, "plots").encode())


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
        blocks += [Heading("All tasks"), tables.summary(list(tasks))]
        if mean := results["mean_gap_closed"]:
            blocks.append(
                Paragraph(
                    f"Mean share of the gap closed: {percent(mean['value'])} "
                    f"({', '.join(mean['tasks'])})."
                )
            )
    for task in tasks:
        blocks += _task(task, results)
    blocks += [Heading("Models and run"), tables.models(results), tables.run(results)]
    if runs:
        blocks += [Heading("Where it ran", 3), tables.machines(runs)]
    blocks.append(Folded("How to read the figures", [Paragraph(text) for text in _READING]))
    return blocks


def _title(results: Mapping[str, Any]) -> str:
    names = wording.model_names(results["models"])
    return f"{names['base']}, proxy-tuned by {names['expert']}"


def _what(results: Mapping[str, Any]) -> str:
    names = wording.model_names(results["models"])
    anti = f", M− {names['antiexpert']}" if "antiexpert" in names else ""
    formula = "s(M) + alpha (s(M+) − s(M−))" if anti else "s(M) + alpha (s(M+) − s(M))"
    return (
        f"M is {names['base']}, M+ {names['expert']}{anti}. The proxy draws from the softmax of "
        f"{formula} with {wording.alpha(results['proxy'])}."
    )


def _task(task: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Block]:
    rows = task["rows"].values()
    metrics = tables.metrics_of(task)
    missing = [name for name in metrics if not any(name in row["metrics"] for row in rows)]
    yield Heading(task["name"])
    if any(row["unjudged"] for row in rows):
        yield Note(
            "note",
            f"Unjudged: {', '.join(map(words, missing))} can only be said by a judge, and none "
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
        yield tables.rows(task, results)
    if task["differences"]:
        yield Heading("The proxy against the other rows", 3)
        yield tables.differences(task)
    if task["gap_closed"]:
        yield tables.gaps(task)
    yield from _sweep(task)
    for table in tables.groups(task):
        yield Heading(f"By {table.header[0]}", 3)
        yield table
    yield from _examples(task)
    yield from _prompts(task)
    yield Folded("Settings", [tables.settings(task)])


def _cards(task: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    name = task["headline"]
    if not name:
        return []
    labels = {"proxy": "proxy", "base": "M", "expert": "M+ alone", "tuned": "M tuned directly"}
    cards = []
    for row, label in labels.items():
        if found := task["rows"].get(row, {}).get("metrics", {}).get(name):
            cards.append((label, percent(found["value"]), words(name)))
    gap = task["gap_closed"].get(name)
    if gap and gap["value"] is not None:
        cards.append(("gap closed", percent(gap["value"]), wording.gap_name(gap)))
    return cards


def _verdict(task: Mapping[str, Any]) -> Iterator[str]:
    """What the headline metric says, in sentences."""
    name = task["headline"]
    against = {d["to"]: d for d in task["differences"] if d["metric"] == name}
    for row, other in (("base", "M"), ("expert", "the expert alone")):
        if difference := against.get(row):
            better, worse = difference["better"], difference["worse"]
            text = (
                f"{words(name).capitalize()}, the proxy against {other}: "
                f"{wording.points(difference)}; better on {better} examples, worse on {worse}."
            )
            yield text + (wording.not_settled(task) if wording.is_open(difference) else "")
    gap = task["gap_closed"].get(name)
    if gap is None:
        return
    ceiling = wording.CEILINGS[gap["to"]]
    text = f"Of the gap between M and {ceiling} it closes {wording.gap_closed(gap)}."
    if gap["to"] == "expert":
        text += " (No directly tuned M is among the rows; the expert alone stands in its place.)"
    if not gap["gap_is_clear"]:
        text += wording.not_settled(task, "whether there is a gap")
    yield text


def _sweep(task: Mapping[str, Any]) -> Iterator[Block]:
    sweep = task["sweep"]
    if not sweep or not sweep["points"]:
        return
    metrics = tables.metrics_of(task)
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
    yield tables.sweep(task, shown)
    if (name := task["headline"]) in shown:
        sign = 1 if metrics[name]["higher_is_better"] else -1
        measured = [point for point in sweep["points"] if name in point["metrics"]]

        def merit(point: Mapping[str, Any]) -> tuple[float, bool]:
            return sign * point["metrics"][name]["value"], point["is_proxy_row"]

        best = max(measured, key=merit)
        yield Paragraph(
            f"Best of these is alpha = {best['alpha']:g}. It is chosen on these examples, and will "
            "look better on them than on others."
        )


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
                    Text(f"{LABELS[row]}{words(value)}{taken}", _shortened(said["text"]), row)
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
