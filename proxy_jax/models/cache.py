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
from typing import TypeAlias

import jax
import jax.numpy as jnp

from proxy_jax.models.config import ModelConfig
from proxy_jax.models.moving import move

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
    row = lambda c, n, s: jax.lax.dynamic_update_slice(c, n, (0, s, 0))  # noqa: E731
    rows = lambda cache, new: jax.vmap(row)(cache, new, start)  # noqa: E731
    return move(rows, cache, new.astype(cache.dtype))


def take(cache: KVCache, slots: jax.Array, lengths: jax.Array) -> KVCache:
    """Rows of a running batch's cache, for `insert`.

    Args:
      cache: a cache of B rows.
      slots: [P] int32, which rows.
      lengths: [P] int32, how many of each one's tokens count.
    """

    def rows(whole: jax.Array) -> jax.Array:
        return whole[:, slots] if whole.ndim == 5 else whole[slots]

    take_bits = lambda whole: move(rows, whole)  # noqa: E731
    return KVCache(
        keys=jax.tree.map(take_bits, cache.keys),
        values=jax.tree.map(take_bits, cache.values),
        lengths=lengths,
    )


def insert(cache: KVCache, rows: KVCache, slots: jax.Array) -> KVCache:
    """Copies freshly prefilled rows into the cache of a running batch.

    Args:
      cache: a cache of B rows and S slots a row.
      rows: a cache of P rows and at most S slots a row.
      slots: [P] int32, which row of `cache` each goes to; B or more drops it (padding).
    """

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        length = part.shape[-2]
        if whole.ndim == 5:
            return whole.at[:, slots, :, :length].set(part, mode="drop")
        return whole.at[slots, :, :length].set(part, mode="drop")

    put_bits = lambda whole, part: move(put, whole, part)  # noqa: E731
    return KVCache(
        keys=jax.tree.map(put_bits, cache.keys, rows.keys),
        values=jax.tree.map(put_bits, cache.values, rows.values),
        lengths=cache.lengths.at[slots].set(rows.lengths, mode="drop"),
    )
