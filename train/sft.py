"""Tunes a small model into an expert: full fine-tuning or LoRA.

    python -m train.sft --config=configs/train/qwen_gguf_gsm.py --config.data.path=rows.jsonl

Reads JSONL rows (prompt and completion, chat messages, or text), trains, and writes the expert as a
Hugging Face directory that the decoder and transformers load, with LoRA also as a PEFT adapter.
Killed at any instant, the same command goes on from its last checkpoint and ends with the same
parameters. configs/train/defaults.py explains every field.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import launch
import manifest
import processes
from configs.train.defaults import sft
from proxy_jax.errors import InputError
from proxy_jax.rows import local_path
from train.checkpoint import Checkpoints, Preemption
from train.data import Batches
from train.export import Lora, check_export, export_expert, write_model
from train.flops import peak_flops, step_flops
from train.job import (
    XLA_FLAGS,
    add_offsets,
    check_config,
    initial_state,
    make_batching,
    make_recipe,
    micro_batches,
    optimizer_config,
    read_examples,
    training_placement,
    whole_batch,
)
from train.metrics import MetricsLog, Progress, plot_losses
from train.optimizer import make_schedule
from train.start import open_start
from train.step import Recipe, evaluate, train_step

# Config fields that do not change the parameters, and may differ when a run goes on.
_FREE = ("output_dir", "log_every", "keep", "distributed", "mesh", "replicate", "topology")


def main(config: ConfigDict) -> None:
    """Data, model, steps, export."""
    check_config(config)
    directory = open_run(config)
    start = open_start(config)
    model, lora = start.model, config.lora
    check_export(directory / "expert", model, lora=lora.rank > 0)
    place = training_placement(config, model)

    # Data.
    (examples, counts), (held, held_counts) = read_examples(config, start.tokenizer)
    batches = Batches(examples, make_batching(config, place, config.epochs))
    steps = len(batches)
    if jax.process_index() == 0:
        print(f"data: {counts}; {steps} steps")
        report = {"train": counts.__dict__, "held_out": held_counts.__dict__, "steps": steps}
        manifest.replace(directory / "data.json", json.dumps(report, indent=2).encode())
        if not lora.rank and not (directory / "model").exists():
            write_model(directory / "model", model, start.tokenizer, start.eos_ids, "float32")
    if config.consistent.alpha_train:
        with tqdm(desc="offsets", unit="token") as bar:
            show = functools.partial(show_tokens, bar)
            examples, held = add_offsets(config, directory, examples, held, place, show)
        batches = Batches(examples, make_batching(config, place, config.epochs))

    # Model, optimizer, and the state of an earlier run.
    recipe = make_recipe(config, model, steps, place)
    state, frozen = initial_state(config, recipe, start)
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint_every, config.keep)
    data = iter(batches)
    with contextlib.ExitStack() as stack:
        stack.enter_context(checkpoints)
        preemption = stack.enter_context(Preemption())
        restored = checkpoints.restore(state)
        if restored is not None:
            state, position = restored
            data.set_state(position)
        first = int(state.step)
        log = stack.enter_context(contextlib.closing(MetricsLog(directory, first)))
        progress = stack.enter_context(
            contextlib.closing(
                Progress(
                    log,
                    first,
                    steps,
                    config.log_every,
                    make_schedule(optimizer_config(config), steps),
                    functools.partial(step_flops, model, lora=lora.rank > 0),
                    peak_flops(config.compute_dtype),
                )
            )
        )

        # Steps.
        for step in range(first + 1, steps + 1):
            batch = next(data)
            lines = np.unique(batch.pop("lines"))
            state, metrics = train_step(recipe, state, frozen, micro_batches(config, place, batch))
            progress.made(step, metrics, lines)
            loss, last, stop = None, step == steps, preemption.noticed(step)
            if held and (last or (config.eval_every and step % config.eval_every == 0)):
                progress.catch_up()
                loss = held_out_loss(config, recipe, state.trained, frozen, held)
                log.write(step, held_out_loss=loss, held_out_perplexity=math.exp(loss))
            if last or stop or loss is not None or checkpoints.due(step):
                progress.catch_up()
                checkpoints.save(step, state, data.get_state(), loss)
                progress.restart_clock()
            if stop and not last:
                break
    if int(state.step) < steps:
        print(f"stopped by SIGTERM after step {step}, saved; the same command goes on from there")
        sys.exit(128 + signal.SIGTERM)

    # The expert.
    if jax.process_index() == 0:
        plot_losses(directory)
    trained = Lora(state.trained, lora.rank, lora.alpha, lora.dropout) if lora.rank else None
    written = export_expert(
        directory / "expert",
        model,
        frozen or state.trained,
        start.tokenizer,
        config.base,
        lora=trained,
        dtype=config.export_dtype,
        eos_ids=start.eos_ids,
    )
    if jax.process_index() == 0:
        print(written)


def open_run(config: ConfigDict) -> Path:
    """Begins or goes on with a run: its directory, with a manifest.

    Raises:
      InputError: the directory holds a run of another config or other data, or this process was
        given another run than process 0.
    """
    directory = Path(config.output_dir).expanduser()
    data = local_path(config.data.path)
    new = manifest.new(config.to_dict(), {"data": manifest.digest(data)} if data.is_file() else {})
    processes.check_same(new)
    old = manifest.read(directory)
    if old and (changed := manifest.changed(old, new, _FREE)):
        raise InputError(
            f"{directory}: holds a run of another config ({changed}); choose another output_dir"
        )
    if jax.process_index() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output_dir {directory}: {error.strerror}") from error
        content = old or new
        content["runs"].append(manifest.this_run())
        manifest.write(directory, content)
    return directory


def show_tokens(bar: tqdm, done: int, total: int) -> None:
    """Moves a bar to so many of so many."""
    bar.total = total
    bar.update(done - bar.n)


def held_out_loss(
    config: ConfigDict, recipe: Recipe, trained: Any, frozen: Any, examples: Any
) -> float:
    """Mean negative log-likelihood of the held-out rows' trained tokens, nats."""
    total = count = 0.0
    for batch in Batches(examples, make_batching(config, recipe.place, 1)):
        batch.pop("lines")
        part, tokens = evaluate(recipe, trained, frozen, whole_batch(recipe.place, batch))
        total, count = total + float(part), count + float(tokens)
    return total / max(count, 1.0)


if __name__ == "__main__":
    launch.run(main, lambda _: sft(), xla_flags=XLA_FLAGS, catches_sigterm=True)
