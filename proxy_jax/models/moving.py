"""Moving numbers about in large arrays: gathers and scatters that touch nothing else."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def move(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """function(*arrays), where the function moves numbers about and computes none.

    XLA's CPU compiler widens a bfloat16 array to float32 to gather from it or scatter into it, the
    whole array (an embedding, a cache), and rounds it back. Integers it moves as they are, so there
    the function is given the numbers' bits. Not differentiable.

    Args:
      function: from the arrays to one of their dtype.
      arrays: of one dtype.
    """
    dtype = arrays[0].dtype
    if dtype.itemsize != 2:
        return function(*arrays)

    def of_bits(*arrays: jax.Array) -> jax.Array:
        bits = [jax.lax.bitcast_convert_type(array, jnp.uint16) for array in arrays]
        return jax.lax.bitcast_convert_type(function(*bits), dtype)

    return jax.lax.platform_dependent(*arrays, cpu=of_bits, default=function)
