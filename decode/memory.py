"""How much memory a job needs on each device, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from decode.scheduler import bucket, cache_slots, prefill_rows
from proxy_jax.errors import InputError
from proxy_jax.models import attention
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.decoder import abstract_params, logical_axes
from proxy_jax.models.quantized import quantized_axes, quantized_shapes
from proxy_jax.sharding import Placement, is_axes
from proxy_jax.trio import Pass, Trio

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes a device needs.

    Attributes:
      weights, caches: by role.
      logits: float32 logits of all roles and the arithmetic on them.
      prefill: float32 attention scores of the longest prompt, of the pass that needs most.
      available: bytes the device has; None if it does not say.
    """

    weights: Mapping[str, int]
    caches: Mapping[str, int]
    logits: int
    prefill: int
    available: int | None

    @property
    def total(self) -> int:
        """All of it."""
        working = max(self.logits, self.prefill)  # one after the other
        return sum(self.weights.values()) + sum(self.caches.values()) + working

    def check(self) -> None:
        """Refuses a job that does not fit.

        Raises:
          InputError: says what is needed and what there is.
        """
        if self.available is not None and self.total > self.available:
            raise InputError(
                f"the job needs about {self.total / GIB:.1f} GiB a device "
                f"(weights {sum(self.weights.values()) / GIB:.1f}, "
                f"caches {sum(self.caches.values()) / GIB:.1f}, logits {self.logits / GIB:.1f}, "
                f"prefill {self.prefill / GIB:.1f}), "
                f"and {self.available / GIB:.1f} GiB are there; use a smaller dtype, batch or "
                "max_new_tokens, or a larger mesh"
            )


def estimate(
    trio: Trio,
    passes: Sequence[Pass],
    place: Placement,
    batch: int,
    contexts: Mapping[str, int],
    new_tokens: int,
) -> Estimate:
    """Memory of a decoding job.

    Args:
      trio: opened, not loaded.
      passes: of its plan.
      place: mesh and rules.
      batch: slots.
      contexts: longest context by role, new tokens included.
      new_tokens: most new tokens a row.
    """
    weights, caches, logits, prefill, loaded = {}, {}, 0, 0, set()
    rows, cached = (batch / place.split(axis) for axis in ("batch", place.attention_rows(batch)))
    for one in passes:
        config, itemsize = one.config, jnp.dtype(one.dtype).itemsize
        held = weight_bytes(one, place)
        heads = config.num_kv_heads / place.split("kv_heads")
        token = 2 * config.num_layers * heads * config.head_dim * itemsize
        for role in one.roles:
            there = trio.tree_key(one) in loaded or (one.shared and role != one.roles[0])
            weights[role] = 0 if there else held
            caches[role] = int(cached * cache_slots(one, contexts) * token)
            logits += int(rows * config.vocab_size / place.split("vocab") * 4)
        loaded.add(trio.tree_key(one))
        length = bucket(max(contexts[role] for role in one.roles) - new_tokens)
        if attention.kernel(config, place, length, jnp.dtype(one.dtype)):
            continue  # it holds no scores
        prompts = prefill_rows(length, batch, place) // place.split("batch") * len(one.roles)
        heads = config.num_heads // place.split("heads")
        # Scores and their softmax.
        prefill = max(prefill, 2 * prompts * heads * length * length * 4)
    return Estimate(weights, caches, 2 * logits, prefill, _available(place))


def parameters(config: ModelConfig) -> int:
    """Parameters of a model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def weight_bytes(one: Pass, place: Placement) -> int:
    """Bytes of one model of a pass that a device holds, adapters left out."""
    dtype = jnp.dtype(one.dtype)
    shapes, axes = abstract_params(one.config), logical_axes(one.config)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    if one.quantize:
        shapes, axes = quantized_shapes(shapes), quantized_axes(axes)
    held = jax.tree.map(
        lambda names, leaf: (
            math.prod(place.sharding(names).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        ),
        axes,
        shapes,
        is_leaf=is_axes,
    )
    return sum(jax.tree.leaves(held))


def _available(place: Placement) -> int | None:
    assert place.mesh is not None
    device = place.mesh.local_devices[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    # CPU devices share the machine's memory, or what a container may use of it.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return memory // len(place.mesh.local_devices)
