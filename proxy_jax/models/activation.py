"""The activations of gated feed-forward layers."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["silu", "gelu_tanh"]


def activate(gate: jax.Array, up: jax.Array, activation: Activation) -> jax.Array:
    """act(gate) * up, both of one dtype; the activation is computed in float32."""
    full = gate.astype(jnp.float32)
    gelu = activation == "gelu_tanh"
    full = jax.nn.gelu(full, approximate=True) if gelu else jax.nn.silu(full)
    return full.astype(up.dtype) * up
