"""Attention: the plain form, and the fused kernels of accelerators where they apply.

Letters: B batch, T new tokens, S cache slots, N query heads, K kv heads, G query heads per kv
head, H head size. Scores and softmax are float32.

Tokens that attend to each other only (prefill, training, scoring) can do without the [T, S] scores
in memory: on TPU by splash attention, a Pallas kernel of JAX, on GPU by cuDNN, on CPU, where
nothing is differentiated, by a kernel of cpu/products.py. `kernel` says when; the platform is that
of the mesh, so what is compiled for a TPU elsewhere is what runs there. A decode step reads a cache
once either way, and is plain.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from proxy_jax.cpu import products
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.einsum import einsum
from proxy_jax.sharding import Placement

_LANES = 128  # of a TPU's vectors
_LARGEST_BLOCK = 512
_AMPERE = 8.0


def kernel(
    config: ModelConfig, place: Placement, length: int, dtype: jnp.dtype
) -> Literal["splash", "cudnn", "cpu"] | None:
    """The fused kernel for `length` tokens that attend to each other; None is the plain form.

    That of CPUs runs on one device, without soft-cap. For the others all layers must have one
    window, a device the kv heads of its query heads, and numbers 16 bits: both would round float32
    to fewer. Splash takes lengths and head sizes that fill a TPU's vectors (head sizes of 64, too);
    cuDNN, from NVIDIA's Ampere on, even lengths, head sizes up to 128 and no soft-cap.
    """
    if place.platform == "cpu":
        alone = place.mesh is None or place.mesh.size == 1
        fits = alone and length > 1 and config.attention_softcap is None
        return "cpu" if fits and dtype.name in products.FLOATS and products.available() else None
    one_window = len(set(config.layer_windows)) == 1
    if not one_window or place.split("heads") != place.split("kv_heads") or dtype.itemsize != 2:
        return None
    if place.platform == "tpu":
        whole = length % _LANES == 0 and config.head_dim % (_LANES // 2) == 0
        return "splash" if whole else None
    if place.platform == "gpu":
        fits = config.head_dim % 8 == 0 and config.head_dim <= 128 and length % 2 == 0
        fits = fits and config.attention_softcap is None
        return "cudnn" if fits and place.compute_capability >= _AMPERE else None
    return None


def attend_fresh(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    segments: jax.Array | None,
    config: ModelConfig,
    place: Placement,
) -> jax.Array:
    """`attend` of T tokens to each other: causally, in their layer's window and own segment.

    Args:
      q: [B, T, N, H]; keys, values: [B, K, T, H].
      mask: [B or 1, T, T] bool, True where visible: what the rest says, for the plain form.
      segments: [B, T] int32, or None.
      config: has the window and soft-cap.
      place: where the arrays lie.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    chosen = kernel(config, place, q.shape[1], q.dtype)
    if chosen == "splash":
        return splash_attend(q, keys, values, segments, config, place)
    if chosen == "cudnn":
        return _cudnn_attend(q, keys, values, mask, segments, config)
    if chosen == "cpu":
        of_rows = jnp.broadcast_to(mask, (len(q), *mask.shape[1:]))
        return _cpu_attend(config, q, keys, values, of_rows)
    return attend(q, keys, values, mask, config)


def splash_attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segments: jax.Array | None,
    config: ModelConfig,
    place: Placement,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attend_fresh` by splash attention; interpret runs the kernel's steps on any platform."""
    length, window = q.shape[1], config.layer_windows[0]
    if window is None:
        mask: splash.Mask = splash.CausalMask((length, length))
    else:  # LocalMask counts the tokens behind the own one
        mask = splash.LocalMask((length, length), (window - 1, 0), 0)
    block = next(n for n in (_LARGEST_BLOCK, 256, _LANES) if length % n == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def local(
        q: jax.Array, keys: jax.Array, values: jax.Array, segments: jax.Array | None
    ) -> jax.Array:
        run = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=sizes,
            attn_logits_soft_cap=config.attention_softcap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        if segments is None:
            return jax.vmap(run)(q, keys, values)
        return jax.vmap(lambda q, k, v, s: run(q, k, v, splash.SegmentIds(s, s)))(
            q, keys, values, segments
        )

    q = (q.astype(jnp.float32) * config.query_scale).astype(q.dtype).swapaxes(1, 2)
    if place.mesh is None:
        out = local(q, keys, values, segments)
    else:
        rows = place.attention_rows(len(q))
        of_heads = place.rules.spec((rows, "heads", None, None))
        of_kv_heads = place.rules.spec((rows, "kv_heads", None, None))
        of_rows = PartitionSpec() if segments is None else place.rules.spec((rows, None))
        out = jax.shard_map(
            local,
            mesh=place.mesh,
            in_specs=(of_heads, of_kv_heads, of_kv_heads, of_rows),
            out_specs=of_heads,
            check_vma=False,  # Pallas kernels do not say what varies over which axis
        )(q, keys, values, segments)
    return out.swapaxes(1, 2)


def _cudnn_attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    segments: jax.Array | None,
    config: ModelConfig,
) -> jax.Array:
    window = config.layer_windows[0]
    return jax.nn.dot_product_attention(
        q,
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        mask=None if segments is None else mask[:, None],
        scale=config.query_scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cpu_attend(config: ModelConfig, *operands: jax.Array) -> jax.Array:
    """`attend` by the CPU's kernel; where it is differentiated, plain."""

    @jax.custom_batching.custom_vmap
    def run(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        return products.attend(q, keys, values, mask, config.query_scale)

    @run.def_vmap
    def _(size: int, batched: list[bool], *operands: jax.Array) -> tuple[jax.Array, bool]:
        of_all = [
            x if b else jnp.broadcast_to(x, (size, *x.shape))
            for x, b in zip(operands, batched, strict=True)
        ]
        made = run(*(x.reshape(-1, *x.shape[2:]) for x in of_all))
        return made.reshape(of_all[0].shape), True

    return run(*operands)


def _cpu_attend_forward(config: ModelConfig, *operands: jax.Array) -> tuple[jax.Array, Any]:
    def plain(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        return attend(q, keys, values, mask, config)

    return jax.vjp(plain, *operands)


def _cpu_attend_backward(config: ModelConfig, back: Any, gradient: jax.Array) -> Any:
    return back(gradient)


_cpu_attend.defvjp(_cpu_attend_forward, _cpu_attend_backward)


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, config: ModelConfig
) -> jax.Array:
    """Grouped-query attention.

    Args:
      q: [B, T, N, H]; keys, values: [B, K, S, H]; mask: [B, T, S] bool, True where visible.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    scores = _scores(q, keys, mask, config)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = einsum("BKTGS,BKSH->BTKGH", weights, values)
    return out.astype(q.dtype).reshape(q.shape)


def attend_beside(
    q: jax.Array,
    old: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    config: ModelConfig,
) -> jax.Array:
    """`attend` to a cache and to keys and values beside it: one softmax over both.

    Args:
      q: [B, T, N, H].
      old: keys and values of the cache, [B, K, S, H].
      new: those of the tokens themselves, [B, K, T, H].
      mask: [B, T, S + T] bool, True where visible.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    slots = old[0].shape[2]
    masks = mask[..., :slots], mask[..., slots:]
    scores = [
        _scores(q, keys, seen, config) for (keys, _), seen in zip((old, new), masks, strict=True)
    ]
    top = jnp.maximum(*(jnp.max(s, axis=-1, keepdims=True) for s in scores))
    shares = [jnp.exp(s - top) for s in scores]
    total = sum(jnp.sum(s, axis=-1, keepdims=True) for s in shares)
    parts = [
        einsum("BKTGS,BKSH->BTKGH", (share / total).astype(values.dtype), values)
        for share, (_, values) in zip(shares, (old, new), strict=True)
    ]
    out = parts[0] + parts[1]
    return out.astype(q.dtype).reshape(q.shape)


def _scores(q: jax.Array, keys: jax.Array, mask: jax.Array, config: ModelConfig) -> jax.Array:
    """[B, K, T, G, S] float32, the lowest number where masked."""
    batch, length, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)  # N -> K G
    scores = einsum("BTKGH,BKSH->BKTGS", q, keys)
    scores = softcap(scores * config.query_scale, config.attention_softcap)
    return jnp.where(mask[:, None, :, None], scores, jnp.finfo(jnp.float32).min)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Squashes into (-cap, cap); the identity for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
