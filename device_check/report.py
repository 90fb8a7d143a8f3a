"""The figures as Markdown, ready for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from device_check.figures import Figure

_GIB = 2**30
_ENOUGH = 0.85  # of the floor; what is below wants an explanation
Rows = list[list[str]]


def markdown(figures: Sequence[Figure]) -> str:
    """All tables, as far as there are figures for them."""
    by_stage: dict[str, list[Figure]] = {}
    for figure in figures:
        by_stage.setdefault(figure["stage"], []).append(figure)
    machine: Figure = {}
    for figure in by_stage.get("machine", []):
        machine |= figure
    parts = [_machine(machine)]
    if rows := by_stage.get("parity"):
        parts.append(_parity(rows))
    if rows := by_stage.get("decode"):
        parts.append(_decode(rows, machine.get("bandwidth"), by_stage.get("torch", [])))
    if rows := [r for name in ("prefill", "lora", "full") for r in by_stage.get(name, [])]:
        parts.append(_training(rows))
    if rows := by_stage.get("kernels"):
        parts.append(_kernels(rows[-1], machine.get("bandwidth")))
    if ends := [figure for figure in figures if "ended" in figure]:
        lines = [f"- `{figure['stage']}`: {figure['ended']}" for figure in ends]
        parts.append("## Stages that did not end by themselves\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _machine(machine: Figure) -> str:
    if "device" not in machine:
        return "# Device check\n\nThe machine has not said yet what it is."
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# Device check: {machine['device']}",
        "",
        f"{machine['devices']} x {machine['device']} ({machine['platform']}), Python "
        f"{machine['python']}, {versions}; weights are random.",
    ]
    if machine["memory"]:
        lines.append(f"{machine['memory'] / _GIB:.1f} GiB of memory are free to use.")
    if "bandwidth" in machine:
        lines.append(f"It reads {machine['bandwidth'] / 1e9:.0f} GB/s.")
    if "flops" in machine:
        lines.append(f"It multiplies {machine['flops'] / 1e12:.3g} TFLOP/s in bfloat16.")
    if machine["missing"]:
        lines += ["", "Not installed here: " + _missing(machine["missing"]) + "."]
    return "\n".join(lines)


def _missing(missing: dict[str, str]) -> str:
    return "; ".join(f"{name}, for {needs}" for name, needs in missing.items())


def _parity(rows: Sequence[Figure]) -> str:
    cells = [
        [
            row["what"],
            row["plan"],
            row["dtype"],
            row["tokens"],
            f"{row['error']:.2g}",
            f"{row['bound']:.2g}",
            "yes" if row["holds"] else "**NO**",
        ]
        for row in rows
        if "what" in row
    ]
    held = sum(row.get("holds", False) for row in rows)
    heads = ["", "plan", "dtype", "same tokens", "largest error", "bound", "holds"]
    return (
        "## Parity with the CPU\n\n"
        f"{held} of {len(cells)} comparisons hold. Errors are of log-probabilities, in nats, or "
        "relative; the bound in fewer bits than float32 is twice the CPU's own error.\n\n"
        + _table(heads, cells, left=3)
    )


def _decode(rows: Sequence[Figure], bandwidth: float | None, torch: Sequence[Figure]) -> str:
    eager = {
        (row["plan"] == "M alone", row["batch"], row["prompt"]): row["ms"]
        for row in torch
        if "ms" in row
    }
    cells: Rows = []
    short = 0
    for row in rows:
        if "plan" not in row:
            continue
        start = [row["plan"], row["dtype"], row["drawn"], str(row["batch"]), str(row["prompt"])]
        if "left_out" in row:
            cells.append([*start, "does not fit", *[""] * 5])
            continue
        floor = 1e3 * row["bytes"] / bandwidth if bandwidth else None
        share = floor / row["ms"] if floor else None
        short += share is not None and share < _ENOUGH
        key = row["plan"] == "M alone", row["batch"], row["prompt"]
        is_greedy_bfloat16 = row["dtype"] == "bfloat16" and row["drawn"] == "greedy"
        other = eager.get(key) if is_greedy_bfloat16 else None
        cells.append(
            [
                *start,
                f"{row['ms']:.2f}",
                f"{floor:.2f}" if floor else "",
                f"{share:.0%}" if share else "",
                f"{row['over_alone']:.2f}" if "over_alone" in row else "",
                f"{other:.1f} ({other / row['ms']:.1f} x)" if other else "",
                f"{row['prefill_seconds']:.3f}",
            ]
        )
    heads = [
        "", "dtype", "drawn", "batch", "prompt", "ms a step", "floor", "share of the floor",
        "over M alone", "eager torch, ms", "prefill, s",
    ]  # fmt: skip
    return (
        "## Decode steps\n\n"
        "The floor is the time to read weights and caches once, halfway through the output, at the "
        f"bandwidth above. {short} rows fall short of {_ENOUGH:.0%} of it.\n\n"
        + _table(heads, cells, left=3)
    )


def _training(rows: Sequence[Figure]) -> str:
    cells: Rows = []
    for row in rows:
        if "what" not in row:
            continue
        if "left_out" in row:
            cells.append([row["what"], "does not fit", "", "", ""])
            continue
        peak = row["peak_bytes"]
        cells.append(
            [
                row["what"],
                f"{row['seconds']:.3f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['mfu']:.1%}",
                f"{peak / _GIB:.1f}" if peak else "",
            ]
        )
    heads = ["", "seconds", "tokens/s", "MFU", "peak memory, GiB"]
    return "## Prefill and training\n\n" + _table(heads, cells, left=1)


def _kernels(row: Figure, bandwidth: float | None) -> str:
    if "kinds" not in row:
        return "## Where a step's time goes\n\nNo trace was made."
    floor = f", reading alone {1e6 * row['bytes'] / bandwidth:.0f}" if bandwidth else ""
    cells = [
        [f"`{name}`", f"{time:.1f}", f"{time / max(row['busy_us'], 1e-9):.0%}", f"{count:.1f}"]
        for name, time, count in row["kinds"]
    ]
    heads = ["kind of kernel", "microseconds a step", "of the busy time", "kernels a step"]
    return (
        "## Where a step's time goes\n\n"
        f"A chunk of {row['steps']} steps, bfloat16, `separate`, {row['batch']} rows after "
        f"{row['prompt']} tokens: {row['span_us']:.0f} microseconds a step, of which a kernel runs "
        f"{row['busy_us']:.0f}{floor}; {row['gap_us']:.0f} lie between kernels. "
        f"{row['kernels']:.0f} kernels a step; {row['copies_to_host']} copies to the host in the "
        "chunk.\n\n" + _table(heads, cells, left=1)
    )


def _table(heads: Sequence[str], cells: Rows, *, left: int) -> str:
    """A Markdown table whose first columns are words."""
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    lines: list[Any] = [heads, rule, *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
