"""The products of the models."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from proxy_jax.cpu import products

_FEW = 16  # rows, in front of which a weight stands on CPUs


def einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum of two arrays that accumulates and returns float32.

    float32 operands are multiplied as they are: by default GPUs and TPUs would round them to
    fewer bits. bfloat16 operands are not affected.
    """
    return contract(spec, x, y, jnp.float32)


def contract(spec: str, x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """einsum of two arrays that accumulates and returns dtype.

    jnp.einsum names the letters summed over in reverse, for which the CPU compiler transposes y, a
    weight, before each product. Here they are in y's order.
    """
    operands, result = spec.split("->")
    x_letters, y_letters = operands.split(",")
    both = [letter for letter in y_letters if letter in x_letters]
    batch = [letter for letter in both if letter in result]
    summed = [letter for letter in both if letter not in result]

    def axes(letters: str) -> tuple[list[int], list[int]]:
        return [letters.index(a) for a in summed], [letters.index(a) for a in batch]

    (x_summed, x_batch), (y_summed, y_batch) = axes(x_letters), axes(y_letters)
    product = jax.lax.dot_general(
        x,
        y,
        ((x_summed, y_summed), (x_batch, y_batch)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    rest = [letter for letter in x_letters + y_letters if letter not in both]
    made = [*batch, *rest]
    return product.transpose([made.index(letter) for letter in result])


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
    return of_rows(spec, x, weight, jnp.float32)


def of_rows(spec: str, x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """`contract` of activations with a weight, as each backend does it best.

    Args:
      spec: x's rows first, then the inputs; the result is x's rows, then the outputs. A weight
        whose outputs come first has one axis of them, and one of inputs.
      x: activations.
      weight: inputs or outputs first.
      dtype: to sum in.
    """
    operands, result = spec.split("->")
    letters, w_letters = operands.split(",")

    def anywhere(x: jax.Array, weight: jax.Array) -> jax.Array:
        return contract(spec, x, weight, dtype)

    def by_xla_on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
        return _by_xla_on_cpu(spec, x, weight, dtype)

    def on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
        return _on_cpu(spec, x, weight, dtype)

    rows = math.prod(size for a, size in zip(letters, x.shape, strict=True) if a in result)
    if w_letters[0] not in result and (rows > 1 or x.dtype.itemsize >= 4):
        return anywhere(x, weight)

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=anywhere)

    @run.def_vmap
    def _(size: int, batched: list[bool], x: jax.Array, weight: jax.Array) -> Any:
        if batched == [True, False]:  # the roles of a pass, with one weight: so many more rows
            return of_rows(f"Z{letters},{w_letters}->Z{result}", x, weight, dtype), True
        each = [0 if b else None for b in batched]
        by_xla = functools.partial(jax.lax.platform_dependent, cpu=by_xla_on_cpu, default=anywhere)
        return jax.vmap(by_xla, each)(x, weight), True

    return run(x, weight)


def _on_cpu(spec: str, x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """`of_rows` by the kernels, or by XLA where there is none for the weight."""
    operands, result = spec.split("->")
    outputs_first = operands.split(",")[1][0] in result
    if outputs_first and products.available() and products.SUMS.get(x.dtype.name) == dtype:
        made = products.product(x.reshape(-1, weight.shape[1]), weight)
        return made.reshape(*x.shape[:-1], -1)
    return _by_xla_on_cpu(spec, x, weight, dtype)


def _by_xla_on_cpu(spec: str, x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """`of_rows` as XLA's CPU compiler does it quickly.

    Its products of numbers below 32 bits are quick for two rows or more, not for one: one row is
    multiplied twice. A weight whose outputs come first it transposes, unless rows are one axis; and
    it reads one faster that stands in front. Of many rows that makes a transposed result, slow to
    work on.
    """
    operands, result = spec.split("->")
    letters, w_letters = operands.split(",")
    shape = [size for letter, size in zip(letters, x.shape, strict=True) if letter in result]
    rows = math.prod(shape)
    if x.dtype.itemsize < 4 and rows == 1:
        return _by_xla_on_cpu(spec, jnp.concatenate([x, x]), weight, dtype)[:1]
    if w_letters[0] not in result:
        return contract(spec, x, weight, dtype)
    flat = x.reshape(rows, -1)
    if rows <= _FEW:
        # Without the barrier the compiler turns the product around again.
        made = jax.lax.optimization_barrier(contract("OI,RI->OR", weight, flat, dtype)).T
    else:
        made = contract("RI,OI->RO", flat, weight, dtype)
    return made.reshape(*shape, -1)


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
        by_weight = jax.lax.optimization_barrier(by_weight)
        by_weight = by_weight.transpose([turned.index(letter) for letter in w_letters])
    return by_x.astype(x.dtype), by_weight.astype(weight.dtype)


dense.defvjp(_forward, _backward)
