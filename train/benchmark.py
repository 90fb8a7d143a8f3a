"""How fast the training step is: tokens a second, MFU and memory, against the Trainer if asked.

    python -m train.benchmark --config=configs/train/qwen_gguf_gsm.py \\
        --config.data.path=rows.jsonl --config.benchmark.compare=torch

Takes a training config: its model, its first batch, its dtype. Nothing is saved but the figures:
benchmark.json in the output directory. Without data.path the rows are full of random tokens. Nor
does a model need to be there: base may name one of configs/architectures.py, or architecture stand
without a tokenizer, and the weights are random, drawn on the devices.

    python -m train.benchmark --config=configs/train/llama2_13b_gsm_lora.py \\
        --config.data.path= --config.batch_size=4 --config.output_dir=runs/benchmark
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs.architectures import ARCHITECTURES
from configs.train.defaults import sft
from proxy_jax.checkpoints.architecture import Architecture
from proxy_jax.errors import InputError
from proxy_jax.jobs import files, launch, manifest, processes
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.reading import reading
from proxy_jax.rows import local_path
from proxy_jax.sharding import Placement
from train.config import check_benchmark, check_values
from train.data import Batches
from train.flops import peak_flops, step_flops
from train.job import (
    XLA_FLAGS,
    held_parts,
    initial_state,
    make_batching,
    make_recipe,
    micro_batches,
    read_examples,
    training_placement,
)
from train.start import Start, open_start
from train.step import train_step
from train.timing import random_batch, time_steps
from train.torch_trainer import trainer_step_seconds

_GIB = 2**30


def main(config: ConfigDict) -> None:
    """One row of the table after another; then the file."""
    check_values(config)
    check_benchmark(config)
    if not config.output_dir:
        raise InputError("output_dir is empty: where do the figures go?")
    settings = config.benchmark
    directory = local_path(config.output_dir)
    start = open_model(config)
    place = training_placement(config, start.model)
    batch = first_batch(config, start, place)
    peak = peak_flops(config.compute_dtype)
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {config.compute_dtype}, "
        f"{peak / 1e12:.2f} TFLOP/s at best; a batch of {config.batch_size} rows of "
        f"{config.max_length}, {int((batch['segments'] > 0).sum())} tokens"
    )
    rows: list[dict[str, Any]] = []
    for rank in settings.ranks or (config.lora.rank,):
        config.lora.rank = rank
        ours, metrics = measure(config, start, batch, place)
        rows.append(ours)
        if settings.compare:
            seconds = trainer_step_seconds(
                start.checkpoint.hf_config if start.checkpoint else config.architecture.to_dict(),
                batch,
                steps=settings.steps,
                bfloat16=config.compute_dtype == "bfloat16",
                rank=rank,
                modules=config.lora.modules,
                recompute=config.remat != "none",
            )
            rows.append({"by": "torch", "rank": rank, "seconds": seconds})
        flops = step_flops(start.model, metrics, lora=rank > 0)
        for row in rows[-2:] if settings.compare else rows[-1:]:
            median = statistics.median(row["seconds"])
            row |= {
                "tokens_per_second": metrics["tokens"] / median,
                "mfu": flops / median / peak,
            }
            if processes.is_first():
                print(describe(row))
    if not processes.is_first():
        return
    with reading(f"output_dir {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
    content = manifest.new(config.to_dict(), {}) | {"runs": [manifest.this_run()], "rows": rows}
    files.replace(directory / "benchmark.json", json.dumps(content, indent=2).encode())


def open_model(config: ConfigDict) -> Start:
    """Opens what the config names; an architecture needs no tokenizer here.

    Raises:
      InputError: as train.start.open_start, or rows without a tokenizer to read them.
    """
    known = ARCHITECTURES.get(config.base)
    if config.architecture and (known or config.tokenizer or config.base):
        return open_start(config)
    if not known and not config.architecture:
        return open_start(config)
    name, fields = config.base or "architecture", known or config.architecture.to_dict()
    if config.data.path:
        raise InputError(
            f"data.path is set, but {name} is an architecture, which has no tokenizer to read it; "
            "leave it empty, for rows of random tokens"
        )
    return Start(config_from_hf(fields, name), None, (), Architecture(Path(name), fields))


def first_batch(config: ConfigDict, start: Start, place: Placement) -> dict[str, np.ndarray]:
    """This process's rows of a batch, [B, T] arrays: the first of the data, or random tokens."""
    if config.data.path:
        (examples, _), _ = read_examples(config, start.tokenizer)
        return next(iter(Batches(examples, make_batching(config, place, 1))))
    rows = config.batch_size // place.split("batch") * len(held_parts(place))
    return random_batch(rows, config.max_length, start.model.vocab_size)


def measure(
    config: ConfigDict, start: Start, batch: dict[str, np.ndarray], place: Placement
) -> tuple[dict[str, Any], dict[str, float]]:
    """Times the step under the config's remat policy, and asks the compiler about the others.

    Returns:
      A row of the table, and the metrics of the last step.
    """
    recipe = make_recipe(config, start.model, config.benchmark.steps + 1, place)
    state, frozen = initial_state(config, recipe, start)
    read = {name: value for name, value in batch.items() if name != "lines"}
    arrays = micro_batches(config, place, read)
    memory, step = {}, None
    for remat in dict.fromkeys((config.remat, *config.benchmark.remat)):
        other = dataclasses.replace(recipe, remat=remat)
        compiled = train_step.lower(other, state, frozen, arrays).compile()
        analysis = compiled.memory_analysis()
        memory[remat] = analysis.temp_size_in_bytes if analysis else None
        step = step or compiled
    assert step is not None
    seconds, metrics = time_steps(step, state, frozen, arrays, config.benchmark.steps)
    row = {"by": "proxy_jax", "rank": config.lora.rank, "remat": config.remat, "seconds": seconds}
    return row | {"temporary_bytes": memory}, metrics


def describe(row: dict[str, Any]) -> str:
    """A row of the table, as text."""
    seconds = row["seconds"]
    kind = f"LoRA, rank {row['rank']}" if row["rank"] else "full"
    memory = ", ".join(
        f"remat {name} {size / _GIB:.2f} GiB"
        for name, size in row.get("temporary_bytes", {}).items()
        if size is not None
    )
    return (
        f"{row['by']:10} {kind:14} {statistics.median(seconds):7.2f} s a step "
        f"({min(seconds):.2f} to {max(seconds):.2f}), {row['tokens_per_second']:6.0f} tokens/s, "
        f"MFU {row['mfu']:.0%}" + (f"; temporary memory: {memory}" if memory else "")
    )


if __name__ == "__main__":
    launch.run(main, lambda _: sft(), xla_flags=XLA_FLAGS)
