"""The products of the models."""

from __future__ import annotations

import functools

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum of activations with a weight, in float32.

    Its backward pass multiplies in x's dtype too, where JAX's own would widen the weight to the
    float32 of the gradient; and the weight's gradient is made with the smaller of x and gradient in
    front, because the compiler transposes that one: beside an adapter's few columns, x is large.

    Args:
      spec: "x's letters,the weight's letters->the result's letters".
      x: activations, in the dtype to compute in.
      weight: an array of the same dtype.
    """
    return einsum(spec, x, weight)


def _forward(
    spec: str, x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return einsum(spec, x, weight), (x, weight)


def _backward(
    spec: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    operands, result = spec.split("->")
    x_letters, w_letters = operands.split(",")
    gradient = gradient.astype(x.dtype)
    by_x = einsum(f"{result},{w_letters}->{x_letters}", gradient, weight)
    if x.size <= gradient.size:
        by_weight = einsum(f"{x_letters},{result}->{w_letters}", x, gradient)
    else:
        behind = "".join(letter for letter in w_letters if letter in result)
        turned = behind + "".join(letter for letter in w_letters if letter not in result)
        by_weight = einsum(f"{result},{x_letters}->{turned}", gradient, x)
        # Without the barrier the compiler turns the product around again.
        by_weight = einsum(f"{turned}->{w_letters}", jax.lax.optimization_barrier(by_weight))
    return by_x.astype(x.dtype), by_weight.astype(weight.dtype)


dense.defvjp(_forward, _backward)
