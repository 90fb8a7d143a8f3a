"""How figures of an evaluation are said: names of models and rows, shares, differences, gaps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

LABELS = {"base": "M", "expert": "M+", "antiexpert": "M−", "proxy": "proxy", "tuned": "tuned M"}
CEILINGS = {"tuned": "the directly tuned M", "expert": "the expert alone"}
_SHARE = {"share": True}


def percent(share: float, digits: int = 1) -> str:
    """A share as people read it."""
    return f"{100 * share:.{digits}f} %".replace("-", "−")


def words(name: str) -> str:
    """The name of a metric, a subset or a setting."""
    return name.replace("_", " ")


def model_names(models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What people call models: the ends of their paths, as long as it takes to tell them apart.

    Args:
      models: by row, their fields in results.json.
    """
    paths = {row: PurePath(model["path"].removesuffix(".gguf")) for row, model in models.items()}
    longest = max(len(path.parts) for path in paths.values())
    names: dict[str, str] = {}
    for count in range(1, longest + 1):
        names = {row: str(PurePath(*path.parts[-count:])) for row, path in paths.items()}
        if len(set(names.values())) == len(set(paths.values())):
            break
    adapted = {row for row, model in models.items() if model["adapter"]}
    return {row: f"{name} + adapter" if row in adapted else name for row, name in names.items()}


def alpha(proxy: Mapping[str, Any]) -> str:
    """The coefficient of the proxy, or its schedule."""
    if schedule := proxy["alpha_schedule"]:
        return "alpha = " + ", ".join(f"{value:g} from token {start}" for start, value in schedule)
    return f"alpha = {proxy['alpha']:g}"


def value(number: float, metric: Mapping[str, Any]) -> str:
    """A metric's value."""
    return percent(number) if metric["share"] else f"{number:,.1f}"


def signed(number: float | None, metric: Mapping[str, Any]) -> str:
    """A difference between two values of a metric; of shares in points."""
    if number is None:
        return ""
    return f"{100 * number if metric['share'] else number:+,.1f}".replace("-", "−")


def span(difference: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """The interval of a difference."""
    if difference["low"] is None:
        return ""
    return f"{signed(difference['low'], metric)} to {signed(difference['high'], metric)}"


def points(difference: Mapping[str, Any]) -> str:
    """A difference of shares in words."""
    interval = span(difference, _SHARE)
    return f"{signed(difference['value'], _SHARE)} points, 95 % interval {interval}"


def is_open(difference: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference holds 0."""
    return difference["low"] is None or difference["low"] <= 0 <= difference["high"]


def not_settled(task: Mapping[str, Any], what: str = "which is ahead") -> str:
    """What the examples of a task are too few for."""
    return f" {task['examples']} examples do not settle {what}."


def gap_name(gap: Mapping[str, Any]) -> str:
    """Between which rows a gap is."""
    return f"M to {CEILINGS[gap['to']]}"


def gap_span(gap: Mapping[str, Any]) -> str:
    """The interval of the share closed; empty if it has none."""
    if gap["low"] is None:
        return ""
    return f"{percent(gap['low'])} to {percent(gap['high'])}"


def gap_closed(gap: Mapping[str, Any]) -> str:
    """The share of a gap that is closed."""
    if gap["value"] is None:
        return "a share that is undefined, for there is none"
    interval = gap_span(gap)
    closed = percent(gap["value"])
    return f"{closed} (95 % interval {interval})" if interval else closed


def below_expert(task: Mapping[str, Any]) -> str:
    """The warning that the proxy is below its expert alone; empty if it is not."""
    difference = task["below_expert"]
    if difference is None:
        return ""
    name = difference["metric"]
    proxy, expert = (task["rows"][row]["metrics"][name]["value"] for row in ("proxy", "expert"))
    text = (
        f"{task['name']}: the proxy is worse than its expert alone, {percent(proxy)} against "
        f"{percent(expert)} {words(name)} ({points(difference)}). "
        "The expert alone is smaller and faster."
    )
    return text + (not_settled(task) if is_open(difference) else "")
