"""Milliseconds a step, of M alone and of the trio, beside the time that reading takes."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Iterator

import jax

from decode import memory, timing
from decode.sampling import Sampling, Truncation
from decode.timing import GREEDY, Case
from device_check.figures import Figure, Record
from device_check.sizes import Sizes
from proxy_jax.errors import InputError
from proxy_jax.sharding import Placement, make_mesh
from proxy_jax.trio import LoadedTrio, Plan, Trio, load_trio

SAMPLED = Sampling(0.8, Truncation(top_p=0.95))


def run(sizes: Sizes, record: Record) -> None:
    """Records one row of the table after another."""
    alone: dict[tuple, float] = {}  # ms a step of M, by what is alike
    for plan, dtype in sizes.timed:
        trio = sizes.trio((plan, dtype))
        loaded = load_trio(trio, plan=plan, place=placement())
        for case, sampling in _cases(sizes):
            alike = (dtype, case, sampling)
            for name, models in (("M alone", timing.base_alone(loaded)), (plan, loaded)):
                if name == "M alone" and alike in alone:
                    continue
                figure = measure(sizes, trio, models, plan, case, sampling)
                figure = {"plan": name, "dtype": dtype, **figure}
                if name == "M alone" and "ms" in figure:
                    alone[alike] = figure["ms"]
                elif alike in alone and "ms" in figure:
                    figure["over_alone"] = figure["ms"] / alone[alike]
                record(figure)
        del loaded, models
        gc.collect()


def measure(
    sizes: Sizes, trio: Trio, models: LoadedTrio, plan: Plan, case: Case, sampling: Sampling
) -> Figure:
    """Times one case, if there is room for it."""
    figure: Figure = {
        "batch": case.batch,
        "prompt": case.prompt,
        "new_tokens": case.output,
        "drawn": "sampled" if sampling.temperature else "greedy",
    }
    contexts = dict.fromkeys(trio.roles, case.prompt + case.output)
    try:
        # Of the whole trio: its weights are there when M is timed, too.
        memory.estimate(
            trio, trio.passes(plan), models.place, case.batch, contexts, case.output
        ).check()
    except InputError as error:
        return {**figure, "left_out": str(error)}
    times = timing.measure(
        models,
        case,
        alpha=1.0,
        chunk_steps=sizes.chunk_steps,
        repeats=sizes.repeats,
        sampling=sampling,
    )
    milliseconds = [1e3 * seconds / times.steps for seconds in times.decode]
    return {
        **figure,
        "ms": statistics.median(milliseconds),
        "ms_of_each": milliseconds,
        "bytes": timing.step_bytes(models, case),
        "prefill_seconds": statistics.median(times.prefill),
        "peak_bytes": peak_bytes(),
    }


def placement() -> Placement:
    """One device, whatever else there is."""
    return Placement(make_mesh({"data": 1}))


def peak_bytes() -> int | None:
    """Most memory of the device that this process has held; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _cases(sizes: Sizes) -> Iterator[tuple[Case, Sampling]]:
    short, long = sizes.prompts
    of_short = [Case(batch, short, sizes.new_tokens) for batch in sizes.batches]
    of_long = [Case(batch, long, sizes.new_tokens) for batch in sizes.batches]
    # One sampled case tells what drawing costs.
    yield from itertools.product(of_short, [GREEDY])
    yield Case(sizes.middle, short, sizes.new_tokens), SAMPLED
    yield from itertools.product(of_long, [GREEDY])
