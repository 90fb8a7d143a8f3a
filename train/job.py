"""A training job as its config says: the parts it is made of."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import Params
from proxy_jax.models.lora import init_adapter
from proxy_jax.rows import Hub, read_rows
from proxy_jax.sharding import TRAINING, Placement, make_mesh
from proxy_jax.trio import ModelSpec, open_trio
from train.config import optimizer_config
from train.data import Batching
from train.examples import Counts, Example, hold_out, make_examples
from train.offsets import with_offsets
from train.optimizer import make_optimizer
from train.start import Start
from train.step import Recipe, TrainState, new_state

# On CPU XLA would start whatever it can as early as it can, and so hold more at once than the
# memory near it has room for: LoRA on a 0.5B in rows of 4 x 512 took 27 s a step and not 20.
XLA_FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def read_examples(
    config: ConfigDict, tokenizer: Any, date: datetime.date | None = None
) -> tuple[tuple[list[Example], Counts], tuple[list[Example], Counts]]:
    """The examples to train on and the held-out ones, each with what became of the rows.

    Args:
      config: the job's.
      tokenizer: a transformers tokenizer.
      date: what chat templates that print a date take for today; by default today.
    """
    hub = Hub(config.data.path, config.data.subset or None, config.data.split)
    rows = read_rows(config.data.path, hub)
    train, held = hold_out(rows[: config.data.limit or None], config.held_out)
    encode = lambda rows: make_examples(  # noqa: E731
        rows,
        config.data.format,
        tokenizer,
        config.max_length,
        skip_invalid=config.data.skip_invalid,
        date=date,
    )
    return encode(train), encode(held) if held else ([], Counts())


def add_offsets(
    config: ConfigDict,
    directory: Path,
    examples: list[Example],
    held: list[Example],
    place: Placement,
    progress: Callable[[int, int], object],
) -> tuple[list[Example], list[Example]]:
    """The examples with what the large model adds to their logits; see train.offsets."""
    trio = open_trio(
        {
            role: ModelSpec(os.path.expandvars(path), config.compute_dtype)
            for role, path in (("base", config.consistent.base), ("antiexpert", config.base))
        }
    )
    both = with_offsets(
        [*examples, *held],
        trio,
        directory / "offsets",
        place,
        stacked_layers=stacked_layers(config, place),
        progress=progress,
    )
    return both[: len(examples)], both[len(examples) :]


def stacked_layers(config: ConfigDict, place: Placement) -> bool:
    """Whether layers are scanned."""
    known = {"auto": place.platform != "cpu", "scanned": True, "unrolled": False}
    return known[config.layers]


def training_placement(
    config: ConfigDict, model: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> Placement:
    """The mesh, and the rules of training.

    Args:
      config: the job's.
      model: the architecture.
      devices: those of the mesh, by default all there are.

    Raises:
      InputError: a mesh that does not fit the devices, or does not divide the model or the batch.
    """
    rules = dataclasses.replace(TRAINING, **dict.fromkeys(config.replicate))
    place = Placement(make_mesh(config.mesh.to_dict(), devices), rules)
    place.check(model, "base")
    place.check_divides("batch", config.batch_size // config.accumulate, "rows of a micro-batch")
    return place


def held_parts(place: Placement, process: int | None = None) -> tuple[int, ...]:
    """Which of the parts of a batch, as many as place.split("batch"), a process's devices hold.

    They need not lie side by side: on TPU a mesh follows the wires, not the hosts.

    Args:
      place: the mesh.
      process: its index, by default this one's.
    """
    process = jax.process_index() if process is None else process
    parts = place.split("batch")
    cuts = place.sharding(("batch",)).devices_indices_map((parts,))
    mine = [cut[0] for device, cut in cuts.items() if device.process_index == process]  # type: ignore[attr-defined]
    return tuple(sorted({cut.indices(parts)[0] for cut in mine}))


def make_batching(config: ConfigDict, place: Placement, epochs: int) -> Batching:
    """How the config's examples become batches of this process."""
    return Batching(
        batch_size=config.batch_size,
        length=config.max_length,
        seed=config.seed,
        epochs=epochs,
        packing=config.packing,
        parts=held_parts(place),
        part_count=place.split("batch"),
    )


def micro_batches(
    config: ConfigDict, place: Placement, batch: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
    """This process's rows, M parts of P, as those of arrays [A, B / A, ...] on the mesh.

    Each of the A micro-batches takes the next rows of every part, whichever processes hold it.
    """
    parts = len(held_parts(place))

    def cut(x: np.ndarray) -> np.ndarray:
        by_part = x.reshape(parts, config.accumulate, -1, *x.shape[1:])
        return by_part.swapaxes(0, 1).reshape(config.accumulate, -1, *x.shape[1:])

    return {name: _on_mesh(place, cut(x), (None, "batch")) for name, x in batch.items()}


def whole_batch(place: Placement, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows, M parts of P, as those of arrays [B, ...] on the mesh."""
    return {name: _on_mesh(place, x, ("batch",)) for name, x in batch.items()}


def _on_mesh(place: Placement, x: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
    sharding = place.sharding((*axes, *(None,) * (x.ndim - len(axes))))
    return jax.make_array_from_process_local_data(sharding, x)


def make_recipe(config: ConfigDict, model: ModelConfig, steps: int, place: Placement) -> Recipe:
    """The compiled step of a training of so many steps."""
    lora = config.lora
    return Recipe(
        model=model,
        optimizer=make_optimizer(optimizer_config(config), steps),
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        place=place,
        lora_scale=lora.alpha / lora.rank if lora.rank else None,
        lora_dropout=lora.dropout,
        alpha_train=config.consistent.alpha_train,
    )


def initial_state(
    config: ConfigDict, recipe: Recipe, start: Start
) -> tuple[TrainState, Params | None]:
    """The state before the first step, and the frozen weights that an adapter is trained beside."""
    key, adapter_key, weights_key = jax.random.split(jax.random.key(config.seed), 3)
    # What is trained stays float32; what is not is only computed with.
    dtype = config.compute_dtype if config.lora.rank else "float32"
    stacked = stacked_layers(config, recipe.place)
    params = start.params(dtype, recipe.place, weights_key, stacked=stacked)
    if not config.lora.rank:
        # The step writes new parameters over the old ones, which it cannot where a CPU device has
        # taken over memory of ours.
        return new_state(recipe, jax.tree.map(jnp.copy, params), key), None
    adapter = init_adapter(params, config.lora.modules, config.lora.rank, adapter_key)
    # Small: every device holds all of it.
    return new_state(recipe, jax.device_put(adapter, recipe.place.sharding(())), key), params
