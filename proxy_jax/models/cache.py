"""The key-value cache of one model.

Letters: L layers, B batch rows, S cache slots, K kv heads, H head size.

A row's tokens lie at slots 0, 1, 2, ... in order, so a slot's index is its position:

    slot      0  1  2  3  4  5  6  7
    row 0     a  b  c  d  .  .  .  .     length 4, the next token goes to slot 4
    row 1     e  f  x  x  .  .  .  .     length 2; x is stale (padding, a previous row)

Stale slots are never cleared: a query at position p sees slots <= p only, and every slot up to p
has been written by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from proxy_jax.models.config import ModelConfig
from proxy_jax.models.moving import move
from proxy_jax.sharding import LOCAL, Placement

# Layers run either unrolled, each with arrays of its own, or scanned over one stacked array.
Layers: TypeAlias = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Attributes:
      keys, values: [L, B, K, S, H], or a tuple of L arrays [B, K, S, H] for unrolled layers.
      lengths: [B] int32, how many tokens of each row the cache holds.
    """

    keys: Layers
    values: Layers
    lengths: jax.Array

    @classmethod
    def zeros(
        cls, config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype, *, stacked: bool
    ) -> KVCache:
        """An empty cache of `slots` positions a row."""
        shape = (batch, config.num_kv_heads, slots, config.head_dim)

        def layers() -> Layers:
            if stacked:
                return jnp.zeros((config.num_layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(layers(), layers(), jnp.zeros((batch,), jnp.int32))


def write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes new[b] into cache[b] from slot start[b] on.

    Args:
      cache: [B, K, S, H].
      new: [B, K, T, H].
      start: [B] int32.
    """
    new = new.astype(cache.dtype)
    row = lambda s, c, n: jax.lax.dynamic_update_slice(c, n, (0, s, 0))  # noqa: E731
    if new.shape[2] > 1 or cache.dtype.itemsize != 2:
        return move(jax.vmap(row), start, cache, new)

    def select(start: jax.Array, cache: jax.Array, new: jax.Array) -> jax.Array:
        here = jnp.arange(cache.shape[2])[None] == start[:, None]
        return jnp.where(here[:, None, :, None], new, cache)

    # One pass over the cache, where its bits would take two.
    return jax.lax.platform_dependent(start, cache, new, cpu=select, default=jax.vmap(row))


def take(cache: KVCache, slots: jax.Array, lengths: jax.Array) -> KVCache:
    """Rows of a running batch's cache, for `insert`.

    Args:
      cache: a cache of B rows.
      slots: [P] int32, which rows.
      lengths: [P] int32, how many of each one's tokens count.
    """

    def rows(slots: jax.Array, whole: jax.Array) -> jax.Array:
        return whole[:, slots] if whole.ndim == 5 else whole[slots]

    take_bits = lambda whole: move(rows, slots, whole)  # noqa: E731
    return KVCache(
        keys=jax.tree.map(take_bits, cache.keys),
        values=jax.tree.map(take_bits, cache.values),
        lengths=lengths,
    )


def write_layers(cache: jax.Array, new: jax.Array, start: jax.Array, place: Placement) -> jax.Array:
    """`write` to the stacked arrays of all layers, in place.

    Row by row, on each device for its own rows: as one scatter, TPU compilers would copy the cache
    into another order and back.

    Args:
      cache: [L, B, K, S, H].
      new: [L, B, K, T, H].
      start: [B] int32.
      place: where the arrays lie.
    """
    new = new.astype(cache.dtype)
    if place.mesh is None:
        return _write_rows(cache, new, start)
    rows = place.attention_rows(cache.shape[1])
    spec = place.rules.spec((None, rows, "kv_heads", None, None))
    return jax.shard_map(
        _write_rows,
        mesh=place.mesh,
        in_specs=(spec, spec, place.rules.spec((rows,))),
        out_specs=spec,
        check_vma=False,  # custom_vmap does not say what varies over which axis
    )(cache, new, start)


def _over_roles(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function of arrays of one model, from one of several.

    The function's first two arrays, and its result, have a role axis after the layers, the others
    a leading one. By itself, vmap would make a scatter of the writes.
    """

    @jax.custom_batching.custom_vmap
    def of_one(cache: jax.Array, new: jax.Array, *rest: jax.Array) -> jax.Array:
        return function(cache[:, None], new[:, None], *(x[None] for x in rest))[:, 0]

    @of_one.def_vmap
    def _(roles: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        cache, new, *rest = (
            x if is_batched else jnp.broadcast_to(x, (roles, *x.shape))
            for x, is_batched in zip(arrays, batched, strict=True)
        )
        return function(cache.swapaxes(0, 1), new.swapaxes(0, 1), *rest).swapaxes(0, 1), True

    return of_one


@_over_roles
def _write_rows(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """cache [L, R, B, K, S, H], new [L, R, B, K, T, H], start [R, B]."""

    def one(b: jax.Array, cache: jax.Array) -> jax.Array:
        for role in range(cache.shape[1]):
            row = jax.lax.dynamic_slice_in_dim(new[:, role : role + 1], b, 1, axis=2)
            at = (0, role, b, 0, start[role, b], 0)
            cache = jax.lax.dynamic_update_slice(cache, row, at)
        return cache

    return jax.lax.fori_loop(0, cache.shape[2], one, cache)


def insert(cache: KVCache, rows: KVCache, slots: jax.Array, place: Placement = LOCAL) -> KVCache:
    """Copies freshly prefilled rows into the cache of a running batch.

    Args:
      cache: a cache of B rows and S slots a row.
      rows: a cache of P rows and at most S slots a row.
      slots: [P] int32, which row of `cache` each goes to; B or more drops it (padding).
      place: where the arrays lie.
    """

    def put(slots: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
        if whole.ndim == 5:
            return _insert_layers(whole, part, slots, place)
        return whole.at[slots, :, : part.shape[-2]].set(part, mode="drop")

    put_bits = lambda whole, part: move(put, slots, whole, part)  # noqa: E731
    return KVCache(
        keys=jax.tree.map(put_bits, cache.keys, rows.keys),
        values=jax.tree.map(put_bits, cache.values, rows.values),
        lengths=cache.lengths.at[slots].set(rows.lengths, mode="drop"),
    )


def _insert_layers(
    cache: jax.Array, rows: jax.Array, slots: jax.Array, place: Placement
) -> jax.Array:
    """The rows [L, P, K, T, H] in the cache [L, B, K, S, H]: one by one, see `write_layers`."""
    if place.mesh is None:
        return _insert_rows(cache, rows, slots, jnp.zeros(1, jnp.int32))
    axis = place.attention_rows(cache.shape[1])
    spec = place.rules.spec((None, axis, "kv_heads", None, None))
    firsts = jnp.arange(0, cache.shape[1], cache.shape[1] // place.split(axis), dtype=jnp.int32)
    return jax.shard_map(
        _insert_rows,
        mesh=place.mesh,
        in_specs=(
            spec,
            place.rules.spec((None, None, "kv_heads", None, None)),
            place.rules.spec((None,)),
            place.rules.spec((axis,)),
        ),
        out_specs=spec,
        check_vma=False,
    )(cache, rows, slots, firsts)


@_over_roles
def _insert_rows(
    cache: jax.Array, rows: jax.Array, slots: jax.Array, first: jax.Array
) -> jax.Array:
    """cache [L, R, B, K, S, H], rows [L, R, P, K, T, H], slots [R, P]; the same for all roles.

    The cache's rows are those from first[0, 0] on; slots that are not among them are left out.
    """

    def one(p: jax.Array, cache: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(rows, p, 1, axis=2)
        b = slots[0, p] - first[0, 0]
        here = (b >= 0) & (b < cache.shape[2])
        at = (0, 0, jnp.where(here, b, 0), 0, 0, 0)
        row = jnp.where(here, row, jax.lax.dynamic_slice(cache, at, row.shape))
        return jax.lax.dynamic_update_slice(cache, row, at)

    return jax.lax.fori_loop(0, rows.shape[2], one, cache)
