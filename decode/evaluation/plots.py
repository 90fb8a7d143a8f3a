"""Plots of an evaluation as SVG, in colours that a page sets: bars by row, and the sweep."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from decode.evaluation.wording import LABELS, percent, words

# By name, on a light page and on a dark one.
PALETTE = {
    "ink": ("#1f2328", "#e6e8eb"),
    "muted": ("#656d76", "#9aa4ae"),
    "line": ("#d8dce1", "#3a4149"),
    "base": ("#7d8997", "#8b98a7"),
    "expert": ("#2c8c7c", "#4fb8a5"),
    "antiexpert": ("#b6bec8", "#59636e"),
    "proxy": ("#2f5fd0", "#7aa2ff"),
    "tuned": ("#b7791f", "#dfae5b"),
}
# What matplotlib draws with in place of a colour of the palette.
_STAND_IN = {name: f"#0000{10 + i}" for i, name in enumerate(PALETTE)}
_LARGEST = 3  # metrics in one figure
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "proxy_jax",  # the same figure gives the same file
    "font.size": 10,
    "text.color": _STAND_IN["ink"],
    "axes.labelcolor": _STAND_IN["muted"],
    "axes.edgecolor": _STAND_IN["line"],
    "xtick.color": _STAND_IN["muted"],
    "ytick.color": _STAND_IN["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plot_rows(task: Mapping[str, Any]) -> str | None:
    """Bars of every row with their confidence intervals, a panel a metric, as SVG.

    Args:
      task: its part of results.json.

    Returns:
      None if there is nothing to draw.
    """
    metrics = _metrics(task)
    if not metrics:
        return None
    rows = list(task["rows"])
    with matplotlib.rc_context(_STYLE):
        width = max(5.0, 3.4 * len(metrics)) + 0.9
        figure = Figure(figsize=(width, 0.42 * len(rows) + 0.8))
        panels = figure.subplots(1, len(metrics), sharex=True, sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, metrics, strict=True):
            for place, row in enumerate(rows):
                found = task["rows"][row]["metrics"].get(name)
                if found is None:
                    continue
                axes.barh(place, found["value"], height=0.62, color=_STAND_IN[row], alpha=0.85)
                axes.plot(
                    (found["low"], found["high"]), (place, place), color=_STAND_IN["ink"], lw=1.2
                )
                axes.annotate(
                    percent(found["value"]),
                    (found["high"], place),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontweight="bold" if row == "proxy" else "normal",
                )
            expert = task["rows"].get("expert", {}).get("metrics", {}).get(name)
            if expert:
                axes.axvline(expert["value"], color=_STAND_IN["expert"], lw=1, ls=(0, (3, 3)))
            axes.set_title(words(name), fontsize=10, loc="left")
            axes.set_yticks(range(len(rows)), [LABELS[row] for row in rows])
            axes.tick_params(length=0)
            axes.tick_params(axis="y", labelcolor=_STAND_IN["ink"])
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x, 0)))
        panels[0].invert_yaxis()
        highest = max(axes.dataLim.x1 for axes in panels) or 1.0
        # Room for the figures beside the bars; the scale itself ends before.
        ticks = [tick for tick in MaxNLocator(4).tick_values(0, highest) if tick <= highest]
        panels[0].set(xlim=(0, 1.25 * highest), xticks=ticks)
        for axes in panels:
            axes.spines["bottom"].set_bounds(0, highest)
        figure.tight_layout(w_pad=2)
        return _svg(figure, f"{task['name']}-rows")


def plot_sweep(task: Mapping[str, Any]) -> str | None:
    """Metrics by alpha, the headline's with its interval and the rows' values beside it, as SVG.

    Args:
      task: its part of results.json.

    Returns:
      None if there are not two points to draw a line through.
    """
    metrics = _metrics(task)
    if not task["sweep"] or not metrics:
        return None
    headline, *others = metrics
    # A metric may be undefined at an alpha, where no answer counts.
    points = [point for point in task["sweep"]["points"] if headline in point["metrics"]]
    if len(points) < 2:
        return None
    alphas = [point["alpha"] for point in points]
    found = [point["metrics"][headline] for point in points]
    values, colour = [one["value"] for one in found], _STAND_IN["proxy"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.4, 3.7))
        axes = figure.add_subplot()
        low, high = [one["low"] for one in found], [one["high"] for one in found]
        axes.fill_between(alphas, low, high, color=colour, alpha=0.14, lw=0)
        ends = [(values[-1], words(headline), colour)]
        for name, dashes in zip(others, ("--", ":"), strict=False):
            if all(name in point["metrics"] for point in points):
                beside = [point["metrics"][name]["value"] for point in points]
                axes.plot(alphas, beside, dashes, color=_STAND_IN["muted"], lw=1.4)
                ends.append((beside[-1], words(name), _STAND_IN["muted"]))
        axes.plot(alphas, values, "-o", color=colour, lw=2, ms=4.5)
        for point, value in zip(points, values, strict=True):
            if point["is_proxy_row"]:
                axes.plot(point["alpha"], value, "o", ms=11, mfc="none", mec=colour, mew=1.4)
        for row in ("base", "expert", "tuned"):
            if level := task["sweep"]["rows"].get(row, {}).get(headline):
                axes.axhline(level["value"], color=_STAND_IN[row], lw=1.1, ls=(0, (4, 3)))
                ends.append((level["value"], LABELS[row], _STAND_IN[row]))
        axes.set_xlabel("alpha")
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: percent(y, 0)))
        axes.grid(axis="y", color=_STAND_IN["line"], lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.margins(x=0.02, y=0.08)
        _name_ends(axes, ends)
        figure.tight_layout()
        return _svg(figure, f"{task['name']}-sweep")


def in_css(svg: str) -> str:
    """A figure whose colours are the variables --NAME of the page it is put into."""
    return _coloured(svg, {name: f"var(--{name})" for name in PALETTE})


def on_white(svg: str) -> str:
    """A figure with a white ground, as a file of its own."""
    light = _coloured(svg, {name: colours[0] for name, colours in PALETTE.items()})
    return light.replace(">", ' style="background: #ffffff">', 1)


def _metrics(task: Mapping[str, Any]) -> list[str]:
    """Shares that some row has, the headline first."""
    names = [
        metric["name"]
        for metric in task["metrics"]
        if metric["share"]
        and any(metric["name"] in row["metrics"] for row in task["rows"].values())
    ]
    names.sort(key=lambda name: name != task["headline"])
    return names[:_LARGEST]


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes names to the right of the axes, at their heights but not over each other."""
    low, high = axes.get_ylim()
    apart = 0.065 * (high - low)
    ordered = sorted(ends)
    heights: list[float] = []
    for value, _, _ in ordered:
        heights.append(max(value, heights[-1] + apart) if heights else value)
    if heights:
        too_high = max(0.0, heights[-1] - high)
        heights = [height - too_high for height in heights]
    for (_, name, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            name,
            (1.01, height),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            fontsize=9.5,
            annotation_clip=False,
        )


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A page holds several figures, whose ids must differ.
    svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", svg)
    # Fonts are the page's.
    return re.sub(r"(font(?:-family)?:[^;\"]*?)'[^;\"]*", r"\1system-ui, sans-serif", svg)


def _coloured(svg: str, colours: Mapping[str, str]) -> str:
    for name, stand_in in _STAND_IN.items():
        svg = svg.replace(stand_in, colours[name])
    return svg
