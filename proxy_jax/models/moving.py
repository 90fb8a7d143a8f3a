"""Moving numbers about in large arrays: gathers and scatters that touch nothing else."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def move(function: Callable[..., jax.Array], at: jax.Array, *arrays: jax.Array) -> jax.Array:
    """function(at, *arrays), where the function moves numbers about and computes none.

    XLA's CPU compiler widens a bfloat16 array to float32 to gather from it or scatter into it, the
    whole array (an embedding, a cache), and rounds it back. Integers it moves as they are, so there
    the function is given the numbers' bits. Not differentiable.

    Args:
      function: from indices and arrays to one of their dtype.
      at: the indices.
      arrays: of one dtype.
    """
    dtype = arrays[0].dtype
    if dtype.itemsize != 2:
        return function(at, *arrays)

    def of_bits(at: jax.Array, *arrays: jax.Array) -> jax.Array:
        # Held to the indices: the bits of an array that a loop does not change would be made ahead
        # of the loop, all of them.
        at, *arrays = jax.lax.optimization_barrier((at, *arrays))
        bits = [jax.lax.bitcast_convert_type(array, jnp.uint16) for array in arrays]
        return jax.lax.bitcast_convert_type(function(at, *bits), dtype)

    return jax.lax.platform_dependent(at, *arrays, cpu=of_bits, default=function)
