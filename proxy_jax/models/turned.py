"""Weights stored with their outputs first, and their products with activations.

That is the order of checkpoint files, and the one that the CPU's kernels read (cpu/products.py);
XLA's own CPU products of fewer than 32 bits, too, read a weight so about 1.5 times as fast. On
accelerators, and on CPUs without the kernels in float32, inputs come first (layers.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from proxy_jax.models.einsum import of_rows

# How many of the first axes of each weight that can be stored so are inputs, by its name.
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "head": 1}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
    """A weight whose outputs come first.

    Attributes:
      values: [out..., in...].
    """

    values: Any

    @property
    def ndim(self) -> int:
        """That of the weight, as of an array."""
        return self.values.ndim


def product(spec: str, x: jax.Array, weight: Turned) -> jax.Array:
    """einsum of activations and a turned weight, in float32; `spec` as in `contract`."""
    return contract(spec, x, weight.values, jnp.float32)


def contract(spec: str, x: jax.Array, values: jax.Array, dtype: Any) -> jax.Array:
    """einsum of activations and a weight stored with its outputs first, summed in dtype.

    Args:
      spec: "x's letters,the weight's letters->the result's letters", as for a weight whose inputs
        come first: they are last in x, and the result is what is left of x, then the outputs.
      x: activations.
      values: [out..., in...].
    """
    inputs = inputs_of(spec)
    rows, outputs = x.shape[:-inputs], values.shape[:-inputs]
    flat = x.reshape(*rows, -1)
    letters = spec[: len(rows)]
    total = of_rows(f"{letters}I,OI->{letters}O", flat, values.reshape(-1, flat.shape[-1]), dtype)
    return total.reshape(*rows, *outputs)


def inputs_of(spec: str) -> int:
    """How many axes of a product's weight are summed over."""
    x_letters, w_letters = spec.split("->")[0].split(",")
    return sum(letter in x_letters for letter in w_letters)
