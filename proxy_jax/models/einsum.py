"""The one product of the models."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """einsum that accumulates and returns float32.

    float32 operands are multiplied as they are: by default GPUs and TPUs would round them to
    fewer bits. bfloat16 operands are not affected.
    """
    return jnp.einsum(
        spec,
        *operands,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    )
