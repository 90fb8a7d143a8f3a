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
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import launch
from proxy_jax.checkpoints.loading import load_params, open_checkpoint
from proxy_jax.errors import InputError
from proxy_jax.models.decoder import REMAT
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import MODULES, init_adapter
from proxy_jax.sharding import TRAINING, Placement, make_mesh
from train.checkpoint import Checkpoints
from train.data import Batches, Batching
from train.examples import hold_out, make_examples, read_rows
from train.export import Lora, check_export, export_expert
from train.metrics import MetricsLog, plot_losses
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from train.step import Recipe, evaluate, new_state, train_step


def main(config: ConfigDict) -> None:
    """Data, model, steps, export."""
    directory = output_directory(config)
    checkpoint = open_checkpoint(config.base)
    model = config_from_hf(checkpoint.hf_config, str(checkpoint.path))
    tokenizer = checkpoint.tokenizer()
    check_export(directory / "expert", model, lora=config.lora.rank > 0)
    place = training_placement(config)
    place.check(model, "base")

    # Data.
    rows = read_rows(config.data.path, config.data.subset, config.data.split)
    rows = rows[: config.data.limit or None]
    train_rows, held_rows = hold_out(rows, config.held_out)
    examples, counts = make_examples(train_rows, config.data.format, tokenizer, config.max_length)
    held, _ = make_examples(held_rows, config.data.format, tokenizer, config.max_length)
    batches = Batches(examples, make_batching(config, config.epochs))
    steps = len(batches)
    print(f"data: {counts}; {steps} steps")

    # Model, optimizer, and the state of an earlier run.
    stacked = {"auto": jax.default_backend() != "cpu", "scanned": True, "unrolled": False}
    key, adapter_key = jax.random.split(jax.random.key(config.seed))
    params = load_params(
        [checkpoint], model, weights_dtype(config), place, stacked=stacked[config.layers]
    )
    optimizer = OptimizerConfig(**config.optimizer.to_dict())
    lora = config.lora
    recipe = Recipe(
        model=model,
        optimizer=make_optimizer(optimizer, steps),
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        place=place,
        lora_scale=lora.alpha / lora.rank if lora.rank else None,
        lora_dropout=lora.dropout,
    )
    if lora.rank:
        adapter = init_adapter(params, lora.modules, lora.rank, adapter_key)
        replicated = place.sharding(())
        state, frozen = new_state(recipe, jax.device_put(adapter, replicated), key), params
    else:
        state, frozen = new_state(recipe, params, key), None
    schedule = make_schedule(optimizer, steps)
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint_every, config.keep)
    data = iter(batches)
    with contextlib.closing(checkpoints):
        restored = checkpoints.restore(state)
        if restored is not None:
            state, position = restored
            data.set_state(position)
        first = int(state.step)
        log = MetricsLog(directory, first)

        # Steps.
        loss = None
        bar = tqdm(total=steps, initial=first, unit="step", disable=jax.process_index() > 0)
        with contextlib.closing(log), bar:
            started, trained_tokens = time.perf_counter(), 0.0
            for step in range(first, steps):
                batch = next(data)
                lines = np.unique(batch.pop("lines"))
                state, metrics = train_step(recipe, state, frozen, micro_batches(config, batch))
                values = {name: float(value) for name, value in metrics.items()}
                if not math.isfinite(values["loss"]):
                    raise InputError(
                        f"step {step}: the loss is {values['loss']}; "
                        f"rows of the batch: lines {lines[lines > 0].tolist()}"
                    )
                trained_tokens += values["tokens"]
                speed = trained_tokens / (time.perf_counter() - started)
                last = step + 1 == steps
                if held and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                    loss = held_out_loss(config, recipe, state.trained, frozen, held)
                    log.write(step + 1, held_out_loss=loss, held_out_perplexity=math.exp(loss))
                if last or (step + 1) % config.log_every == 0:
                    values |= {"learning_rate": float(schedule(step)), "tokens_per_second": speed}
                    log.write(step + 1, **values)
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.0f} trained tokens/s")
                bar.update()
                checkpoints.save(state, data.get_state(), loss, force=last)

    # The expert.
    if jax.process_index() == 0:
        plot_losses(directory)
    trained = Lora(state.trained, lora.rank, lora.alpha, lora.dropout) if lora.rank else None
    written = export_expert(
        directory / "expert",
        model,
        params if lora.rank else state.trained,
        tokenizer,
        config.base,
        lora=trained,
        dtype=config.export_dtype,
        eos_ids=checkpoint.eos_ids,
    )
    print(written)


def output_directory(config: ConfigDict) -> Path:
    """Creates the output directory, and refuses one of another config.

    Raises:
      InputError: names what is missing, unknown, or differs.
    """
    for field in ("base", "output_dir"):
        if not config[field]:
            raise InputError(f"{field} is empty")
    if not config.data.path:
        raise InputError("data.path is empty: which rows are trained on?")
    if unknown := set(config.lora.modules) - set(MODULES):
        raise InputError(f"lora.modules: {sorted(unknown)[0]!r} is not one of {', '.join(MODULES)}")
    if config.remat not in REMAT:
        raise InputError(f"remat {config.remat!r} is unknown; known: {', '.join(REMAT)}")
    if config.layers not in ("auto", "scanned", "unrolled"):
        raise InputError(f"layers {config.layers!r} is unknown; use auto, scanned or unrolled")
    if config.batch_size % config.accumulate:
        raise InputError(
            f"batch_size {config.batch_size} does not divide into {config.accumulate} micro-batches"
        )
    directory = Path(config.output_dir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    resolved = json.loads(json.dumps(config.to_dict()))
    file = directory / "config.json"
    if file.exists() and json.loads(file.read_text()) != resolved:
        raise InputError(f"{directory}: holds a run of another config; choose another output_dir")
    file.write_text(json.dumps(resolved, indent=2) + "\n")
    return directory


def training_placement(config: ConfigDict) -> Placement:
    """The mesh, and the rules of training."""
    rules = dataclasses.replace(TRAINING, **dict.fromkeys(config.replicate))
    return Placement(make_mesh(config.mesh.to_dict()), rules)


def weights_dtype(config: ConfigDict) -> str:
    """Of the parameters in memory: float32 if they are trained, else what they compute in."""
    return config.compute_dtype if config.lora.rank else "float32"


def make_batching(config: ConfigDict, epochs: int) -> Batching:
    """How the config's examples become batches of this process."""
    return Batching(
        batch_size=config.batch_size,
        length=config.max_length,
        seed=config.seed,
        epochs=epochs,
        packing=config.packing,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def micro_batches(config: ConfigDict, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """[B, T] arrays as [A, B / A, T]."""
    return {
        name: jnp.asarray(value).reshape(config.accumulate, -1, value.shape[-1])
        for name, value in batch.items()
    }


def held_out_loss(
    config: ConfigDict, recipe: Recipe, trained: Any, frozen: Any, examples: Any
) -> float:
    """Mean negative log-likelihood of the held-out rows' trained tokens, nats."""
    total = count = 0.0
    for batch in Batches(examples, make_batching(config, 1)):
        batch.pop("lines")
        part, tokens = evaluate(recipe, trained, frozen, batch)
        total, count = total + float(part), count + float(tokens)
    return total / max(count, 1.0)


if __name__ == "__main__":
    launch.run(main)
