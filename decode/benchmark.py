"""How fast decoding is: prefill and steps, M alone and the trio, against the floor and torch.

    python -m decode.benchmark --config=configs/qwen_gguf_gsm.py \\
        --config.benchmark.plans="('separate','shared')" \\
        --config.benchmark.dtypes="('float32','int8')" --config.benchmark.compare=torch

Takes a decoding config and measures the functions that decode.generate runs, on random prompts;
greedy, every row as long as asked for. No model needs to be there: a path may name one of
configs/architectures.py, and then every model has random weights, drawn on the devices.

    python -m decode.benchmark --config=configs/llama2_13b_task.py --config.plan=shared \\
        --config.expert.path=meta-llama/Llama-2-7b-hf --config.expert.adapter=rank=16 \\
        --config.output_dir=runs/benchmark

configs/defaults.py explains the fields of `benchmark`. The floor of a step is the time to read what
it must (decode.timing.step_bytes) at the bandwidth that a matrix-vector product reaches here, the
best seen before and between the rows. Prints a table, and writes benchmark.json and benchmark.png
into the output directory.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs.architectures import ARCHITECTURES
from configs.defaults import decoding
from decode import job, timing
from decode.timing import Case, Times
from decode.torch_loop import TorchTrio
from proxy_jax.errors import InputError
from proxy_jax.jobs import files, launch, manifest, processes
from proxy_jax.trio import DTYPES, ROLES, Trio

ALONE = "alone"  # in place of a plan: M without the others
Row = dict[str, Any]


def main(config: ConfigDict) -> None:
    """One row of the table after another; then the files."""
    settings = config.benchmark
    if not config.output_dir:
        raise InputError("output_dir is empty: where do the figures go?")
    if settings.compare not in ("", "torch"):
        raise InputError(f"benchmark.compare {settings.compare!r} is unknown; use torch")
    if settings.repeats < 1:
        raise InputError(f"benchmark.repeats must be at least 1, not {settings.repeats}")
    cases = make_cases(settings)
    jobs: list[list[job.Job]] = []  # by dtype, one a plan
    for dtype in settings.dtypes or ("",):
        opened = open_with(config, dtype)
        plans = settings.plans or (opened.plan,)
        jobs.append([dataclasses.replace(opened, plan=plan) for plan in plans])
    for opened in itertools.chain(*jobs):
        check(opened, cases)
    trios = [of_dtype[0].trio for of_dtype in jobs]

    bandwidth = timing.bandwidth()
    first = processes.is_first()
    if first:
        print(
            f"{jax.device_count()} x {jax.devices()[0].device_kind}, "
            f"{bandwidth / 1e9:.1f} GB/s read by a matrix-vector product"
            + ("; random weights" if trios[0].is_random else "")
        )
    directory = Path(config.output_dir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    content = manifest.new(config.to_dict(), {}) | {"runs": [manifest.this_run()]}
    rows: list[Row] = []
    for row in itertools.chain(
        *(measure(config, of_dtype, cases) for of_dtype in jobs),
        *(
            measure_torch(config, trios[0], dtype, cases)
            for dtype in dict.fromkeys(trio.members["base"].spec.dtype for trio in trios)
            if settings.compare
        ),
    ):
        rows.append(row | derived(row, rows))
        if "step_bytes" in row:
            bandwidth = max(bandwidth, timing.bandwidth())
        rows = [row | floor_share(row, bandwidth) for row in rows]
        if first:
            print(describe(rows[-1]), flush=True)
            found = content | {"bandwidth": bandwidth, "rows": rows}
            files.replace(directory / "benchmark.json", json.dumps(found, indent=2).encode())
    if first:
        print("\n".join(ratios(rows)))
        plot(rows).savefig(directory / "benchmark.png", dpi=120)
        print(
            f"figures in {directory}: benchmark.json, benchmark.png; "
            f"shares of the floor there are at {bandwidth / 1e9:.1f} GB/s"
        )


def make_cases(settings: ConfigDict) -> list[Case]:
    """Every batch, prompt and output length with every other.

    Raises:
      InputError: a size that is too small.
    """
    for name, least in (("batch_sizes", 1), ("prompt_lengths", 2), ("output_lengths", 2)):
        if not settings[name] or min(settings[name]) < least:
            raise InputError(f"benchmark.{name} must be {least} or more, not {settings[name]}")
    sizes = settings.batch_sizes, settings.prompt_lengths, settings.output_lengths
    return [Case(*case) for case in itertools.product(*sizes)]


def open_with(config: ConfigDict, dtype: str) -> job.Job:
    """Opens the config's job as if its models said this dtype; as they are for an empty one.

    Raises:
      InputError: an unknown dtype, or models that cannot be combined.
    """
    if dtype not in ("", "int8", *DTYPES):
        raise InputError(
            f"benchmark.dtypes: {dtype!r} is unknown; use int8 or one of {', '.join(DTYPES)}"
        )
    config = config.copy_and_resolve_references()
    config.batch_size = min(config.benchmark.batch_sizes)
    for role in ROLES:
        if dtype == "int8":
            config[role].quantize = dtype
        elif dtype:
            config[role].update(quantize="", dtype=dtype)
    return job.open_job(config, architectures=ARCHITECTURES)


def check(opened: job.Job, cases: Sequence[Case]) -> None:
    """Refuses what does not fit, before anything is loaded.

    Raises:
      InputError: says what.
    """
    for case in cases:
        opened.place.check_divides("batch", case.batch, "benchmark.batch_sizes")
        length = case.prompt + case.output
        for role, member in opened.trio.members.items():
            if length > member.config.max_positions:
                raise InputError(
                    f"benchmark: {length} tokens exceed {role}'s context of "
                    f"{member.config.max_positions}"
                )
        contexts = dict.fromkeys(opened.trio.members, length)
        opened.estimate(contexts, case.output, case.batch).check()


def measure(config: ConfigDict, jobs: Sequence[job.Job], cases: Sequence[Case]) -> Iterator[Row]:
    """M alone, then the trio under each plan; one set of weights in memory at a time."""
    spec = jobs[0].trio.members["base"].spec
    settings = config.benchmark
    for opened in jobs:
        loaded = opened.load()
        kinds = [(ALONE, timing.base_alone(loaded))] if opened is jobs[0] else []
        kinds += [(opened.plan, loaded)] if len(opened.trio.roles) > 1 else []
        del loaded
        while kinds:
            name, models = kinds.pop(0)
            for case in cases:
                times = timing.measure(
                    models,
                    case,
                    alpha=config.alpha,
                    chunk_steps=config.chunk_steps,
                    repeats=settings.repeats,
                )
                yield {
                    **_row("proxy_jax", spec.quantize or spec.dtype, name, case, times),
                    "step_bytes": timing.step_bytes(models, case),
                }
            del models
        gc.collect()


def measure_torch(
    config: ConfigDict, trio: Trio, dtype: str, cases: Sequence[Case]
) -> Iterator[Row]:
    """The same on torch.

    Raises:
      InputError: torch is not installed.
    """
    members = list(trio.members.values())
    vocabulary = min(member.config.vocab_size for member in members)
    models = TorchTrio([m.checkpoint.hf_config for m in members], dtype, config.alpha)
    names = (ALONE, "trio") if len(members) == 3 else (ALONE,)
    for name, case in itertools.product(names, cases):
        runs = [
            models.decode(
                case.tokens(vocabulary), case.output, trio.eos_ids(), alone=name == ALONE
            )[1:]
            for _ in range(config.benchmark.repeats + 1)
        ]
        prefill, decode = (list(seconds) for seconds in zip(*runs[1:], strict=True))
        yield _row("torch", dtype, name, case, Times(prefill, decode, case.output - 1))


def _row(by: str, dtype: str, plan: str, case: Case, times: Times) -> Row:
    return {
        "by": by,
        "dtype": dtype,
        "plan": plan,
        **dataclasses.asdict(case),
        "prefill_seconds": times.prefill,
        "decode_seconds": times.decode,
        "steps": times.steps,
    }


def derived(row: Row, before: Sequence[Row]) -> Row:
    """The figures that follow from a row's times.

    Args:
      row: a measured row.
      before: those above it, among them M alone.

    Returns:
      ms_a_step; first_token_seconds, prefill and one step; tokens_per_second, prefill included;
      overhead over M alone, and that of the floors, of a row of the trio.
    """
    ms = 1e3 * statistics.median(row["decode_seconds"]) / row["steps"]
    prefill = statistics.median(row["prefill_seconds"])
    whole = statistics.median(map(sum, zip(row["prefill_seconds"], row["decode_seconds"])))  # noqa: B905
    found: Row = {
        "ms_a_step": ms,
        # torch's first token comes with its prefill.
        "first_token_seconds": prefill + (ms / 1e3 if row["steps"] == row["output"] else 0.0),
        "tokens_per_second": row["batch"] * row["output"] / whole,
    }
    for other in before:
        if row["plan"] != ALONE == other["plan"] and all(
            other[name] == row[name] for name in ("by", "dtype", "batch", "prompt", "output")
        ):
            found["overhead"] = ms / other["ms_a_step"]
            if "step_bytes" in row:
                found["floor_overhead"] = row["step_bytes"] / other["step_bytes"]
    return found


def floor_share(row: Row, bandwidth: float) -> Row:
    """share_of_floor, the time to read a step's bytes at a bandwidth over the step's."""
    if "step_bytes" not in row:
        return {}
    return {"share_of_floor": 1e3 * row["step_bytes"] / bandwidth / row["ms_a_step"]}


def describe(row: Row) -> str:
    """A row of the table, as text."""
    spread = [1e3 * seconds / row["steps"] for seconds in row["decode_seconds"]]
    text = (
        f"{row['by']:10} {row['dtype']:9} {row['plan']:9} "
        f"{row['batch']:4} x {row['prompt']} -> {row['output']:<5} "
        f"first token {row['first_token_seconds']:7.3f} s, "
        f"{row['ms_a_step']:8.2f} ms a step ({min(spread):.2f} to {max(spread):.2f}), "
        f"{row['tokens_per_second']:8.1f} tokens/s"
    )
    if "step_bytes" in row:
        text += f", {row['step_bytes'] / 1e9:.3f} GB a step, {row['share_of_floor']:.0%} of floor"
    if "overhead" in row:
        text += f", {row['overhead']:.2f} x M alone"
    if "floor_overhead" in row:
        text += f" (floor {row['floor_overhead']:.2f})"
    return text


def ratios(rows: Sequence[Row]) -> list[str]:
    """Ours against torch, the trio: like for like, and the best of each."""
    lines = []
    cases = dict.fromkeys((row["batch"], row["prompt"], row["output"]) for row in rows)
    for case in cases:
        here = [
            row
            for row in rows
            if row["plan"] != ALONE and (row["batch"], row["prompt"], row["output"]) == case
        ]
        ours = [row for row in here if row["by"] != "torch"]
        theirs = [row for row in here if row["by"] == "torch"]
        pairs = [(a, b) for a in ours for b in theirs if a["dtype"] == b["dtype"]]
        if ours and theirs:
            best = lambda row: row["tokens_per_second"]  # noqa: E731
            pairs.append((max(ours, key=best), max(theirs, key=best)))
        for a, b in pairs:
            lines.append(
                f"{Case(*case)}: {a['dtype']} {a['plan']} against torch {b['dtype']}: "
                f"{a['tokens_per_second'] / b['tokens_per_second']:.2f} x the tokens/s, steps "
                f"{b['ms_a_step'] / a['ms_a_step']:.2f} x, first token "
                f"{b['first_token_seconds'] / a['first_token_seconds']:.2f} x as fast"
            )
    return list(dict.fromkeys(lines))


def plot(rows: Sequence[Row]) -> Figure:
    """Tokens/s of every row, a panel for each prompt and output length."""
    panels = list(dict.fromkeys((row["prompt"], row["output"]) for row in rows))
    names = list(dict.fromkeys((row["by"], row["dtype"], row["plan"]) for row in rows))
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(2.5 + 4 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    width = 0.8 / len(names)
    for panel, ax in zip(panels, axes, strict=True):
        for i, name in enumerate(names):
            found = {
                row["batch"]: row["tokens_per_second"]
                for row in rows
                if (row["by"], row["dtype"], row["plan"]) == name
                and (row["prompt"], row["output"]) == panel
            }
            places = [batches.index(batch) - 0.4 + width * (i + 0.5) for batch in found]
            bars = ax.bar(places, list(found.values()), width, label=" ".join(name))
            ax.bar_label(bars, fmt="%.3g", fontsize=6)
        ax.set_title(f"prompt {panel[0]}, {panel[1]} new tokens", fontsize=9)
        ax.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        ax.set_xlabel("batch")
        ax.set_yscale("log")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("tokens/s, prefill included")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    return figure


if __name__ == "__main__":
    launch.run(main, lambda _: decoding())
