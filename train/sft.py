"""Tunes a small model into an expert: full fine-tuning or LoRA.

    python -m train.sft --config=configs/train/qwen_gguf_gsm.py --config.data.path=rows.jsonl

Reads JSONL rows (prompt and completion, chat messages, or text), trains, and writes the expert as a
Hugging Face directory that the decoder and transformers load, with LoRA also as a PEFT adapter.
Killed at any instant, the same command goes on from its last checkpoint and ends with the same
parameters. configs/train/defaults.py explains every field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from configs.train.defaults import sft
from proxy_jax.errors import InputError
from proxy_jax.jobs import files, launch, manifest, processes
from proxy_jax.reading import reading
from proxy_jax.rows import local_path
from proxy_jax.trio import ModelSpec, identify
from train.checkpoint import Checkpoints, Preemption
from train.config import check_config, optimizer_config
from train.data import Batches
from train.examples import Example, digest_examples
from train.export import Lora, check_export, export_expert, write_model
from train.flops import peak_flops, step_flops
from train.job import (
    XLA_FLAGS,
    add_offsets,
    initial_state,
    make_batching,
    make_recipe,
    micro_batches,
    read_examples,
    training_placement,
    whole_batch,
)
from train.metrics import MetricsLog, Progress, plot_losses
from train.optimizer import make_schedule
from train.start import open_start
from train.step import Recipe, evaluate, train_step

# Config fields that do not change the parameters, and may differ when a run goes on.
_FREE = (
    "output_dir", "log_every", "keep", "distributed", "mesh", "replicate", "topology",
    "export_dtype",
)  # fmt: skip
_EXAMPLES = "examples"  # an input that is known only when the rows are read


@dataclasses.dataclass(frozen=True)
class Run:
    """A run in its directory, which no other process may take until it is closed.

    Attributes:
      directory: of the run.
      date: of the day on which it began, for chat templates that print the date.
    """

    directory: Path
    date: datetime.date
    _lock: IO[bytes] | None

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Refuses other examples than the run began with; remembers those of a new run.

        A tokenizer, a template or a data set of the hub may have changed since.

        Raises:
          InputError: they are others, or others than those of process 0.
        """
        found = digest_examples(examples)
        processes.check_same(manifest.new({}, {_EXAMPLES: found}))
        if not self._lock:
            return
        content = manifest.read(self.directory)
        assert content is not None, "open_run has written it"
        if content["inputs"].setdefault(_EXAMPLES, found) != found:
            raise InputError(
                f"{self.directory}: the rows give other examples than those that the run began with"
            )
        manifest.write(self.directory, content)

    def close(self) -> None:
        """Lets go of the directory."""
        if self._lock:
            self._lock.close()


def main(config: ConfigDict) -> None:
    """Checks the config, and trains in a directory that it holds alone."""
    check_config(config)
    with contextlib.closing(open_run(config)) as run:
        train(config, run)


def train(config: ConfigDict, run: Run) -> None:
    """Data, model, steps, export."""
    directory = run.directory
    start = open_start(config)
    model, lora = start.model, config.lora
    check_export(directory / "expert", model, lora=lora.rank > 0)
    place = training_placement(config, model)

    # Data.
    (examples, counts), (held, held_counts) = read_examples(config, start.tokenizer, run.date)
    run.check_examples([*examples, *held])
    batches = Batches(examples, make_batching(config, place, config.epochs))
    steps = len(batches)
    if processes.is_first():
        print(f"data: {counts}; {steps} steps")
        report = {"train": counts.__dict__, "held_out": held_counts.__dict__, "steps": steps}
        files.replace(directory / "data.json", json.dumps(report, indent=2).encode())
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
        state, damaged = checkpoints.restore(state, data)
        first = int(state.step)
        if damaged and processes.is_first():
            print(f"going on from step {first}: {damaged}")
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
                log.write(step, **held_out_metrics(step, loss))
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
    if processes.is_first():
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
    if processes.is_first():
        print(written)


def open_run(config: ConfigDict) -> Run:
    """Begins or goes on with a run: its directory, with a manifest.

    Raises:
      InputError: the directory holds a run of another config or other data, one that another
        process goes on with, or one without a manifest; or this process was given another run
        than process 0.
    """
    directory = local_path(config.output_dir)
    data = local_path(config.data.path)
    with reading(data):
        digests = {"data": manifest.digest(data)} if data.is_file() else {}
    models = {"base": config.base, "consistent.base": config.consistent.base}
    specs = {name: ModelSpec(os.path.expandvars(path)) for name, path in models.items() if path}
    new = manifest.new(config.to_dict(), {**digests, **identify(specs)})
    processes.check_same(new)
    lock = _lock(directory) if processes.is_first() else None
    try:
        old = manifest.read(directory)
        if old and (changed := manifest.changed(old, new, (*_FREE, _EXAMPLES))):
            raise InputError(
                f"{directory}: holds a run of another config ({changed}); choose another output_dir"
            )
        if not old and list(directory.glob("checkpoints/*")):
            raise InputError(
                f"{directory}: has checkpoints, but no {manifest.FILE} says of which run; choose "
                "another output_dir"
            )
        content = old or new
        content["runs"].append(manifest.this_run())
        with reading(directory / manifest.FILE, "runs: no date of the first one"):
            date = processes.from_first(str(content["runs"][0]["started"])[:10])
            run = Run(directory, datetime.date.fromisoformat(date), lock)
        if lock:
            manifest.write(directory, content)
        return run
    except BaseException:
        if lock:
            lock.close()
        raise


def _lock(directory: Path) -> IO[bytes]:
    """Creates a directory if need be, and a file in it that no other process has locked."""
    with reading(f"output_dir {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("ab")
    try:
        files.lock(lock, directory, "another process is training in it")
    except InputError:
        lock.close()
        raise
    return lock


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


def held_out_metrics(step: int, loss: float) -> dict[str, float]:
    """What is recorded of the loss on the held-out rows; a perplexity beyond any number is not.

    Raises:
      InputError: the loss is not a number.
    """
    if not math.isfinite(loss):
        raise InputError(f"step {step}: the loss on the held-out rows is {loss}")
    metrics = {"held_out_loss": loss}
    with contextlib.suppress(OverflowError):
        metrics["held_out_perplexity"] = math.exp(loss)
    return metrics


if __name__ == "__main__":
    launch.run(main, lambda _: sft(), xla_flags=XLA_FLAGS, catches_sigterm=True)
