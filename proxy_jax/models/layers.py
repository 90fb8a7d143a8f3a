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
from proxy_jax.models.activation import activate
from proxy_jax.models.attention import attend, attend_beside, attend_fresh
from proxy_jax.models.config import ModelConfig
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
        segments: jax.Array | None,
        cache: tuple[jax.Array, jax.Array] | None,
        start: jax.Array | None,
        place: Placement,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attends to the cache, if any, and to the tokens themselves.

        Args:
          x: [B, T, D].
          angles: of `rotate`.
          mask: [B, T, T] without a cache, [B, T, S] with one, [B, T, S + T] without `start`.
          segments: as in decoder.hidden_states; the mask has them, too.
          cache: keys and values [B, K, S, H].
          start: [B], the slots to write the tokens' keys and values to; None leaves the cache as
            it is.
          place: where activations lie on the mesh.

        Returns:
          [B, T, D], and keys and values: the cache if it was written, else those of the tokens.
        """
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
        rows = place.attention_rows(len(x))
        q = place.constrain(q, (rows, None, "heads", None))
        k = place.constrain(k, (rows, None, "kv_heads", None))
        v = place.constrain(v, (rows, None, "kv_heads", None))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
        if cache is None:
            out = attend_fresh(q, k, v, mask, segments, config, place)
        elif start is None:
            out = attend_beside(q, cache, (k, v), mask, config)
        else:
            k, v = kv.write(cache[0], k, start), kv.write(cache[1], v, start)
            out = attend(q, k, v, mask, config)
        out = place.constrain(out, ("batch", None, "heads", None))
        out = project("BTNH,NHD->BTD", out, self.o)
        return (add_bias(out, self.o_bias[...]) if config.out_bias else out), (k, v)


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
        bias, activation = self.config.mlp_bias, self.config.activation
        if bias:
            gate = add_bias(project("BTD,DF->BTF", x, self.gate), self.gate_bias[...])
            up = add_bias(project("BTD,DF->BTF", x, self.up), self.up_bias[...])
            hidden = activate(gate, up, activation)
        else:
            hidden = lora.gated(x, self.gate.get_value(), self.up.get_value(), activation)
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
        segments: jax.Array | None,
        cache: tuple[jax.Array, jax.Array] | None,
        start: jax.Array | None,
        place: Placement,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The new residual stream [B, T, D], and keys and values; arguments as in Attention."""
        config = self.config
        before, after = config.norms != "post", config.norms != "pre"
        with jax.named_scope("attention"):
            h = rms_norm(x, self.attention_norm[...], config) if before else x
            h, keys_values = self.attention(h, angles, mask, segments, cache, start, place)
            h = rms_norm(h, self.attention_post_norm[...], config) if after else h
            x = place.constrain(x + h, ("batch", None, "act_embed"))
        with jax.named_scope("mlp"):
            h = rms_norm(x, self.mlp_norm[...], config) if before else x
            h = self.mlp(h, place)
            h = rms_norm(h, self.mlp_post_norm[...], config) if after else h
            x = place.constrain(x + h, ("batch", None, "act_embed"))
        return x, keys_values


def norm_weight(
    config: ModelConfig, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> nnx.Param:
    """The weight of an RMSNorm, initialised to scale by 1."""
    weight = param(rngs, shape, axes)
    if not config.norm_unit_offset:
        weight[...] = weight[...] + 1.0
    return weight
