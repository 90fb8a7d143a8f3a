"""Compiles the training step for a TPU slice that is not there, and says whether it would do.

    python -m train.compile_check --config=configs/train/llama2_7b_gsm.py \\
        --config.topology=v5e:4x4 --config.accumulate=8

Compiles train.step.train_step from shapes alone: no TPU, no weights, no data. Prints what one
device holds and moves. Exits with status 1 where a device has no room.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from configs.architectures import ARCHITECTURES
from configs.train.defaults import sft
from proxy_jax import hlo
from proxy_jax.checkpoints.loading import open_checkpoint, param_shapes
from proxy_jax.errors import InputError
from proxy_jax.jobs import launch
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.lora import init_adapter
from proxy_jax.topology import hbm_bytes, tpu_devices
from train.config import check_values
from train.job import make_recipe, stacked_layers, training_placement
from train.step import LOSS_TOKENS, Recipe, TrainState, train_step

_GIB = 2**30
_STEPS = 1000  # of the schedule; they change nothing that is compiled but a constant


@dataclasses.dataclass(frozen=True)
class Report:
    """What one device does in a training step.

    Attributes:
      memory: of the step.
      state: bytes of parameters and moments, trained and frozen.
      transfers: all of a step whose rows are full, those of loops as often as they run.
      layers: the transfers of one turn of each loop over the layers, forward and backward.
      traffic: bytes of main memory read and written by it.
      seconds: of the compilation.
    """

    memory: hlo.Memory
    state: int
    transfers: list[hlo.Collective]
    layers: list[list[hlo.Collective]]
    traffic: int
    seconds: float


def check(config: ConfigDict, recipe: Recipe) -> Report:
    """Compiles the step of a config for the devices of the recipe's mesh."""
    state, frozen = state_shapes(config, recipe)
    start = time.perf_counter()
    compiled = train_step.lower(recipe, state, frozen, batch_shapes(config, recipe)).compile()
    seconds = time.perf_counter() - start
    # The loop over pieces of the head runs as often as the longest row's trained tokens ask for.
    program = hlo.read(compiled, assumed_trips=-(-config.max_length // LOSS_TOKENS))
    layers = [
        program.collectives(loop.body)
        for loop in program.nested(program.entry)
        if loop.trips == recipe.model.num_layers
    ]
    return Report(
        memory=hlo.memory(compiled),
        state=hlo.device_bytes((state.trained, state.moments, frozen)),
        transfers=program.all_collectives(program.entry),
        layers=layers,
        traffic=program.traffic(program.entry),
        seconds=seconds,
    )


def state_shapes(config: ConfigDict, recipe: Recipe) -> tuple[TrainState, Any]:
    """Shapes of train.job.initial_state."""
    place = recipe.place
    here = place.sharding(())

    def everywhere(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

    dtype = config.compute_dtype if config.lora.rank else "float32"
    params = param_shapes(recipe.model, dtype, place, stacked=stacked_layers(config, place))
    trained, frozen = params, None
    if config.lora.rank:
        make = lambda key: init_adapter(params, config.lora.modules, config.lora.rank, key)  # noqa: E731
        trained = jax.tree.map(everywhere, jax.eval_shape(make, jax.random.key(0)))
        frozen = params
    moments = optax.tree_map_params(
        recipe.optimizer,
        lambda moment, x: jax.ShapeDtypeStruct(x.shape, moment.dtype, sharding=x.sharding),
        jax.eval_shape(recipe.optimizer.init, trained),
        trained,
        transform_non_params=everywhere,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=here)
    return TrainState(step, trained, moments, everywhere(key)), frozen  # type: ignore[arg-type]


def batch_shapes(config: ConfigDict, recipe: Recipe) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of train.job.micro_batches."""
    rows = config.batch_size // config.accumulate
    shape = (config.accumulate, rows, config.max_length)
    sharding = recipe.place.sharding((None, "batch", None))
    names = ("tokens", "targets", "segments", "positions", "weights")
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name == "weights" else jnp.int32, sharding=sharding
        )
        for name in names
    }


def main(config: ConfigDict) -> None:
    """Prints the report."""
    check_values(config)
    if not config.topology:
        raise InputError("topology is empty: which TPU slice? v5e:4x4, for one")
    if config.consistent.alpha_train:
        raise InputError("consistent.alpha_train is set: only plain training is compiled here")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    devices = tpu_devices(config.topology)
    model = architecture(config)
    place = training_placement(config, model, devices)
    recipe = make_recipe(config, model, _STEPS, place)
    assert place.mesh is not None
    mesh = " x ".join(f"{axis}={size}" for axis, size in place.mesh.shape.items())
    print(f"{config.topology}: {len(devices)} x {devices[0].device_kind}, mesh {mesh}")
    kind = f"LoRA, rank {config.lora.rank}" if config.lora.rank else "all parameters"
    print(
        f"  {config.batch_size} rows of {config.max_length} in {config.accumulate} micro-batches, "
        f"{kind}, {config.compute_dtype}, remat {config.remat}"
    )
    available = hbm_bytes(devices[0])
    try:
        report = check(config, recipe)
    except jax.errors.JaxRuntimeError as error:
        print(f"verdict: FAILS: {(str(error).splitlines() or [type(error).__name__])[0]}")
        sys.exit(1)
    print_report(report, available)
    if available is not None and report.memory.peak > available:
        print(
            f"verdict: FAILS: {report.memory.peak / _GIB:.2f} GiB needed, "
            f"{available / _GIB:.2f} there"
        )
        sys.exit(1)
    room = "" if available is None else f" in {available / _GIB:.2f}"
    print(f"verdict: fits, {report.memory.peak / _GIB:.2f} GiB{room}")


def architecture(config: ConfigDict) -> ModelConfig:
    """What is trained: known by its hub id, stated in the config, or read from files."""
    if config.base in ARCHITECTURES:
        return config_from_hf(ARCHITECTURES[config.base], config.base)
    if config.architecture:
        return config_from_hf(config.architecture.to_dict(), "architecture")
    if not config.base:
        raise InputError("base is empty: which model is trained?")
    checkpoint = open_checkpoint(config.base)
    return config_from_hf(checkpoint.hf_config, str(checkpoint.path))


def print_report(report: Report, available: int | None) -> None:
    """The step, as text."""
    used = report.memory
    print(f"training step (compiled in {report.seconds:.1f} s)")
    print(
        f"  memory      parameters and moments {report.state / _GIB:.2f} GiB; arguments "
        f"{used.arguments / _GIB:.2f}, temporary {used.temporary / _GIB:.2f}, peak "
        f"{used.peak / _GIB:.2f}" + ("" if available is None else f" of {available / _GIB:.2f}")
    )
    print(f"  traffic     {report.traffic / _GIB:.1f} GiB a step")
    for found in report.layers:
        print(f"  transfers   a layer: {hlo.by_kind(found)}")
    print(f"              a step: {hlo.by_kind(report.transfers)}")


if __name__ == "__main__":
    launch.run(main, lambda _: sft())
