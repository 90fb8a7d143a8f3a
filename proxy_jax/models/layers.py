"""The parts of a transformer block, as NNX modules that declare parameters and compute.

Letters: B batch, T new tokens, S cache slots, N query heads, K kv heads, G query heads per kv
head, H head size, D model width, F mlp width. Norms, RoPE, scores and softmax are float32 whatever
the weights are; products of bfloat16 inputs are accumulated and returned in float32.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from proxy_jax.models import cache as kv
from proxy_jax.models import lora
from proxy_jax.models.config import ModelConfig
from proxy_jax.models.einsum import einsum
from proxy_jax.sharding import Placement

NO_WINDOW = 2**30  # more positions back than any context has


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int = 0
) -> nnx.Param:
    """A float32 parameter with named logical axes; normal(1 / sqrt(fan_in)), or zeros."""
    key = rngs.params()
    if fan_in:
        value = jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in)
    else:
        value = jnp.zeros(shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes)


def project(spec: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
    """einsum of activations and weights: accumulated in float32, returned in x's dtype."""
    return lora.product(spec, x, weight.get_value()).astype(x.dtype)


def over_last(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A weight of the last dimensions of x, with leading ones so that it broadcasts to x."""
    return jnp.expand_dims(weight, tuple(range(x.ndim - weight.ndim)))


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias of the last dimensions of x."""
    return x + over_last(bias, x)


def rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
    """RMSNorm over the dimensions that the weight has, the last of x, in float32."""
    full = x.astype(jnp.float32)
    over = tuple(range(-weight.ndim, 0))
    full = full * jax.lax.rsqrt(jnp.mean(full * full, axis=over, keepdims=True) + config.norm_eps)
    scale = weight.astype(jnp.float32) + (1.0 if config.norm_unit_offset else 0.0)
    return (full * over_last(scale, x)).astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Squashes into (-cap, cap); the identity for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies RoPE, pairing dimension i with i + H/2 (Hugging Face's layout).

    Args:
      x: [B, T, heads, H].
      angles: cos and sin, [B, T, H / 2] float32.
    """
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, config: ModelConfig
) -> jax.Array:
    """Grouped-query attention.

    Args:
      q: [B, T, N, H]; keys, values: [B, K, S, H]; mask: [B, T, S] bool, True where visible.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)  # N -> K G
    scores = einsum("BTKGH,BKSH->BKTGS", q, keys)
    scores = softcap(scores * config.query_scale, config.attention_softcap)
    scores = jnp.where(mask[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = einsum("BKTGS,BKSH->BTKGH", weights, values)
    return out.astype(q.dtype).reshape(batch, length, heads, head_dim)


class Attention(nnx.Module):
    """Causal self-attention with RoPE, a cache, and each family's norms and biases."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H = (config.sizes[letter] for letter in "DNKH")
        self.config = config
        self.q = param(rngs, (D, N, H), ("embed", "heads", None), D)
        self.k = param(rngs, (D, K, H), ("embed", "kv_heads", None), D)
        self.v = param(rngs, (D, K, H), ("embed", "kv_heads", None), D)
        self.o = param(rngs, (N, H, D), ("heads", None, "embed"), N * H)
        if config.qkv_bias:
            self.q_bias = param(rngs, (N, H), ("heads", None))
            self.k_bias = param(rngs, (K, H), ("kv_heads", None))
            self.v_bias = param(rngs, (K, H), ("kv_heads", None))
        if config.out_bias:
            self.o_bias = param(rngs, (D,), (None,))
        if config.qk_norm == "head":
            self.q_norm = norm_weight(config, rngs, (H,), (None,))
            self.k_norm = norm_weight(config, rngs, (H,), (None,))
        elif config.qk_norm == "projection":
            self.q_norm = norm_weight(config, rngs, (N, H), ("heads", None))
            self.k_norm = norm_weight(config, rngs, (K, H), ("kv_heads", None))

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        start: jax.Array,
        place: Placement,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Returns the output [B, T, D] and the layer's keys and values [B, K, S, H]."""
        config = self.config
        q = project("BTD,DNH->BTNH", x, self.q)
        k = project("BTD,DKH->BTKH", x, self.k)
        v = project("BTD,DKH->BTKH", x, self.v)
        if config.qkv_bias:
            q = add_bias(q, self.q_bias[...])
            k = add_bias(k, self.k_bias[...])
            v = add_bias(v, self.v_bias[...])
        if config.qk_norm != "none":
            q = rms_norm(q, self.q_norm[...], config)
            k = rms_norm(k, self.k_norm[...], config)
        q, k = rotate(q, angles), rotate(k, angles)
        q = place.constrain(q, ("batch", None, "heads", None))
        k = place.constrain(k, ("batch", None, "kv_heads", None))
        v = place.constrain(v, ("batch", None, "kv_heads", None))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
        if cache is not None:
            k, v = kv.write(cache[0], k, start), kv.write(cache[1], v, start)
            cache = (k, v)
        out = attend(q, k, v, mask, config)
        out = project("BTNH,NHD->BTD", out, self.o)
        return (add_bias(out, self.o_bias[...]) if config.out_bias else out), cache


class MLP(nnx.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.model_dim, config.mlp_dim
        self.config = config
        self.gate = param(rngs, (D, F), ("embed", "mlp"), D)
        self.up = param(rngs, (D, F), ("embed", "mlp"), D)
        self.down = param(rngs, (F, D), ("mlp", "embed"), F)
        if config.mlp_bias:
            self.gate_bias = param(rngs, (F,), ("mlp",))
            self.up_bias = param(rngs, (F,), ("mlp",))
            self.down_bias = param(rngs, (D,), (None,))

    def __call__(self, x: jax.Array, place: Placement) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        bias = self.config.mlp_bias
        gate = project("BTD,DF->BTF", x, self.gate)
        up = project("BTD,DF->BTF", x, self.up)
        if bias:
            gate, up = add_bias(gate, self.gate_bias[...]), add_bias(up, self.up_bias[...])
        gate = gate.astype(jnp.float32)
        gelu = self.config.activation == "gelu_tanh"
        gate = jax.nn.gelu(gate, approximate=True) if gelu else jax.nn.silu(gate)
        hidden = gate.astype(x.dtype) * up
        hidden = place.constrain(hidden, ("batch", None, "mlp"))
        out = project("BTF,FD->BTD", hidden, self.down)
        return add_bias(out, self.down_bias[...]) if bias else out


class Block(nnx.Module):
    """One layer: attention and MLP, each with its norms and residual."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        width: Any = (config.model_dim,), (None,)
        if config.norms != "post":
            self.attention_norm = norm_weight(config, rngs, *width)
            self.mlp_norm = norm_weight(config, rngs, *width)
        if config.norms != "pre":
            self.attention_post_norm = norm_weight(config, rngs, *width)
            self.mlp_post_norm = norm_weight(config, rngs, *width)

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        start: jax.Array,
        place: Placement,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Returns the new residual stream [B, T, D] and the layer's keys and values."""
        config = self.config
        before, after = config.norms != "post", config.norms != "pre"
        with jax.named_scope("attention"):
            h = rms_norm(x, self.attention_norm[...], config) if before else x
            h, cache = self.attention(h, angles, mask, cache, start, place)
            h = rms_norm(h, self.attention_post_norm[...], config) if after else h
            x = place.constrain(x + h, ("batch", None, "act_embed"))
        with jax.named_scope("mlp"):
            h = rms_norm(x, self.mlp_norm[...], config) if before else x
            h = self.mlp(h, place)
            h = rms_norm(h, self.mlp_post_norm[...], config) if after else h
            x = place.constrain(x + h, ("batch", None, "act_embed"))
        return x, cache


def norm_weight(
    config: ModelConfig, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> nnx.Param:
    """The weight of an RMSNorm, initialised to scale by 1."""
    weight = param(rngs, shape, axes)
    if not config.norm_unit_offset:
        weight[...] = weight[...] + 1.0
    return weight
