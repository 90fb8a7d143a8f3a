"""Compiles a decoding job for a TPU slice that is not there, and says whether it would do.

    python -m decode.compile_check --config=configs/llama2_70b_chat.py --config.topology=v5e:4x4

Compiles the engine's own functions, prefill and the chunk of decode steps, from shapes alone: no
TPU, no weights. Prints what one device holds, moves and touches. A device must have room; no weight
may move between devices in a step. Exits with status 1 where one of the two fails.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from configs.architectures import ARCHITECTURES
from configs.defaults import decoding
from decode import job, memory
from decode.layouts import (
    Shapes,
    compile_chunk,
    compile_prefill,
    input_formats,
    shapes,
    state_shapes,
)
from decode.requests import Options, as_schedule
from decode.scheduler import Generator, bucket, prefill_rows
from proxy_jax import hlo
from proxy_jax.checkpoints.loading import param_shapes
from proxy_jax.errors import InputError
from proxy_jax.jobs import launch
from proxy_jax.models.config import ModelConfig
from proxy_jax.sharding import Placement
from proxy_jax.topology import hbm_bytes, tpu_devices
from proxy_jax.trio import LoadedTrio, Pass, Plan, Trio, describe_trio

_GIB = 2**30
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one device does in a decode step.

    Attributes:
      memory: of the chunk.
      weights, caches: bytes held.
      traffic: bytes of main memory read and written.
      floor: bytes of the weights that a step multiplies with, and of the caches.
      layers: by pass, the transfers of one layer.
      rest: the transfers outside the layers.
      seconds: of the compilation.
    """

    memory: hlo.Memory
    weights: int
    caches: int
    traffic: int
    floor: int
    layers: Mapping[str, list[hlo.Collective]]
    rest: list[hlo.Collective]
    seconds: float

    @property
    def moved_weights(self) -> list[hlo.Collective]:
        """Transfers of weights between devices: there should be none."""
        everything = [*self.rest, *(one for layer in self.layers.values() for one in layer)]
        return [one for one in everything if one.marked]


@dataclasses.dataclass(frozen=True)
class PrefillReport:
    """What one device takes to prefill prompts of one pass.

    Attributes:
      rows, length: prompts, and their padded length.
      memory: of this function alone; the arguments are the pass's weights and cache.
      moved_weights: transfers of weights between devices.
      seconds: of the compilation.
    """

    rows: int
    length: int
    memory: hlo.Memory
    moved_weights: list[hlo.Collective]
    seconds: float


class Check:
    """A job's functions, compiled for the devices of a placement.

    Args:
      trio: its members' configs; nothing else of it is used.
      plan: how it runs.
      options: how it decodes; strings that are banned or stop a text are left out.
      place: mesh and rules.
      context: cache slots a row.

    Raises:
      InputError: a mesh that does not divide the models or the batch.
    """

    def __init__(self, trio: Trio, plan: Plan, options: Options, place: Placement, context: int):
        trio.check_placement(place)
        passes = trio.passes(plan)
        self.params = tuple(_weights(trio, one, place) for one in passes)
        loaded = LoadedTrio(trio, passes, self.params, place, stacked_layers=True)
        options = dataclasses.replace(
            options, eos_ids=(0,), stop=(), banned=(), banned_first=(), banned_tokens=(),
            banned_first_tokens=(),
        )  # fmt: skip
        self.generator = Generator(loaded, options)
        self.program = self.generator.program
        self.options = options
        self.slots, row = self.generator.batch_shape(
            dict.fromkeys(trio.roles, context), len(as_schedule(options.alpha))
        )
        self.state = state_shapes(self.program, self.slots, options.batch_size, row)

    def held(self) -> tuple[int, int]:
        """Bytes of the weights and of the caches on one device."""
        caches = [(cache.keys, cache.values) for cache in self.state.caches]
        return hlo.device_bytes(self.params), hlo.device_bytes(caches)

    def step(self) -> StepReport:
        """Compiles the chunk; its order of weights and caches is that of the prefills after it."""
        start = time.perf_counter()
        compiled = compile_chunk(
            self.program,
            self.params,
            self.state,
            self.generator.settings,
            self.options.chunk_steps,
        )
        seconds = time.perf_counter() - start
        weights, states = input_formats(compiled)
        self.params, self.state = shapes(self.params, weights), shapes(self.state, states)
        program = hlo.read(compiled, _is_weight)
        [chunk] = program.loops(program.entry)
        layers, rest = {}, program.collectives(chunk.body)
        names = ["_".join(one.roles) for one in self.program.passes]
        for loop in program.loops(chunk.body):
            found = program.collectives(loop.body)
            scope = [part for part in loop.op_name.split("/") if not part.startswith("vmap")][-2:]
            if scope[0] in names and scope[1] == "while":
                layers[scope[0]] = found
            else:
                rest += program.all_collectives(loop.body) * (loop.trips or 1)
        held, caches = self.held()
        return StepReport(
            memory=hlo.memory(compiled),
            weights=held,
            caches=caches,
            traffic=program.traffic(chunk.body),
            floor=caches + sum(_read(one.config, p) for one, p in self._passes()),
            layers=layers,
            rest=rest,
            seconds=seconds,
        )

    def prefill(self, index: int, longest: int) -> PrefillReport:
        """Compiles the prefill of one pass for prompts of up to `longest` tokens."""
        length = min(bucket(longest), self.slots[index])
        rows = prefill_rows(length, self.options.batch_size, self.program.place)
        cache = self.state.caches[index]
        start = time.perf_counter()
        compiled = compile_prefill(self.program, index, self.params[index], cache, (rows, length))
        seconds = time.perf_counter() - start
        program = hlo.read(compiled, _is_weight)
        moved = [one for one in program.all_collectives(program.entry) if one.marked]
        return PrefillReport(rows, length, hlo.memory(compiled), moved, seconds)

    def _passes(self) -> Sequence[tuple[Pass, Shapes]]:
        return list(zip(self.program.passes, self.params, strict=True))


def main(config: ConfigDict) -> None:
    """Prints the report."""
    if not config.topology:
        raise InputError("topology is empty: which TPU slice? v5e:4x4, for one")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    options = job.options(config)
    devices = tpu_devices(config.topology)
    place = job.placement(config, devices)
    trio = describe_trio(job.model_specs(config), ARCHITECTURES)
    if config.context > min(member.config.max_positions for member in trio.members.values()):
        raise InputError(f"context {config.context} is longer than that of a model")
    check = Check(trio, job.plan(config), options, place, config.context)
    assert place.mesh is not None
    mesh = " x ".join(f"{axis}={size}" for axis, size in place.mesh.shape.items())
    available = hbm_bytes(devices[0])
    print(f"{config.topology}: {len(devices)} x {devices[0].device_kind}, mesh {mesh}")
    for role, member in trio.members.items():
        size = memory.parameters(member.config) / 1e9
        print(f"  {role:10} {size:.2f} B parameters in {member.spec.dtype}, {member.spec.path}")
    print(f"  batch {options.batch_size}, {config.context} slots a row, plan {job.plan(config)}")

    weights, caches = check.held()
    if available is not None and weights + caches > available:
        _fail(
            f"weights {weights / _GIB:.2f} GiB and caches {caches / _GIB:.2f}, "
            f"{available / _GIB:.2f} there; a row's caches take "
            f"{caches / options.batch_size / _GIB:.2f}"
        )
    try:
        step = check.step()
    except jax.errors.JaxRuntimeError as error:
        _fail(_reason(error))
    print_step(step, options.chunk_steps, available)
    failures = []
    if step.moved_weights:
        kinds = hlo.by_kind(step.moved_weights)
        failures.append(f"weights move between devices in a step ({kinds})")
    needed = step.memory.peak
    longest = config.context - options.max_new_tokens
    done: set[Any] = set()
    for index, one in enumerate(check.program.passes):
        if (one.config, one.dtype, one.quantize, len(one.roles)) in done or longest < 1:
            continue
        done.add((one.config, one.dtype, one.quantize, len(one.roles)))
        try:
            report = check.prefill(index, longest)
        except jax.errors.JaxRuntimeError as error:
            _fail(_reason(error))
        # The other passes' weights and caches stay where they are.
        others = step.weights + step.caches - report.memory.arguments
        whole = max(others, 0) + report.memory.peak
        needed = max(needed, whole)
        print_prefill("_".join(one.roles), report, whole)
    if available is not None and needed > available:
        failures.append(f"{needed / _GIB:.2f} GiB needed, {available / _GIB:.2f} there")
    if failures:
        _fail("; ".join(failures))
    room = "" if available is None else f" in {available / _GIB:.2f}"
    print(f"verdict: fits, {needed / _GIB:.2f} GiB{room}; no weight moves")


def print_step(step: StepReport, steps: int, available: int | None) -> None:
    """The decode step, as text."""
    held, used = step.weights + step.caches, step.memory
    print(f"decode, chunk of {steps} steps (compiled in {step.seconds:.1f} s)")
    print(
        f"  memory      weights {step.weights / _GIB:.2f} GiB, caches {step.caches / _GIB:.2f}; "
        f"arguments {used.arguments / _GIB:.2f}, temporary {used.temporary / _GIB:.3f} "
        f"({used.temporary / held:.1%} of weights and caches), peak {used.peak / _GIB:.2f}"
        + ("" if available is None else f" of {available / _GIB:.2f}")
    )
    print(
        f"  traffic     {step.traffic / _GIB:.2f} GiB a step, {step.traffic / step.floor:.3f} of "
        f"the floor (weights once, caches once: {step.floor / _GIB:.2f})"
    )
    for name, found in step.layers.items():
        print(f"  transfers   a layer of {name}: {hlo.by_kind(found)}")
    print(f"              outside the layers: {hlo.by_kind(step.rest)}")
    for one in step.moved_weights:
        print(f"  FAILURE     a weight moves: {one.kind} {one.size / _MIB:.1f} MiB, {one.op_name}")


def print_prefill(name: str, report: PrefillReport, whole: int) -> None:
    """A prefill, as text."""
    print(
        f"prefill of {name}, {report.rows} x {report.length} tokens (compiled in "
        f"{report.seconds:.1f} s)\n"
        f"  memory      temporary {report.memory.temporary / _GIB:.3f} GiB, peak "
        f"{whole / _GIB:.2f} with all models"
    )
    if report.moved_weights:
        print(f"  transfers   of weights: {hlo.by_kind(report.moved_weights)}")


def _weights(trio: Trio, one: Pass, place: Placement) -> Shapes:
    for role in one.roles:
        if trio.members[role].spec.adapter:
            raise InputError(f"{role}.adapter: only whole models are compiled here")
    return param_shapes(
        one.config, one.dtype, place, stacked=True, copies=len(one.roles), quantize=one.quantize
    )


def _read(config: ModelConfig, params: Shapes) -> int:
    """Bytes of the weights that every step multiplies with; of an embedding it reads rows only."""
    used = {k: v for k, v in params.items() if config.tied_head or k != "embedding"}
    return hlo.device_bytes(used)


def _is_weight(name: str) -> bool:
    return name.startswith("params")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _fail(reason: str) -> None:
    print(f"verdict: FAILS: {reason}")
    sys.exit(1)


if __name__ == "__main__":
    launch.run(main, lambda _: decoding())
