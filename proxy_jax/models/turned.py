"""Weights stored with their outputs first, and their products with activations.

That is the order of checkpoint files, and the one that the CPU's kernels read (cpu/products.py);
XLA's own CPU products of fewer than 32 bits, too, read a weight so about 1.5 times as fast. On
accelerators, and on CPUs without the kernels in float32, inputs come first (layers.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from proxy_jax.cpu import products
from proxy_jax.models.activation import Activation, activate
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


def turn(weight: Any, inputs: int) -> Turned:
    """An array [in..., out...] with so many axes of inputs, turned."""
    return Turned(weight.transpose(*range(inputs, weight.ndim), *range(inputs)))


def product(spec: str, x: jax.Array, weight: Turned, *adapter: Any) -> jax.Array:
    """einsum of activations and a turned weight, in float32.

    Args:
      spec, x: as in `contract`.
      weight: the weight.
      adapter: none, or low [rows..., R] in x's dtype and a turned B [out..., R]; their product is
        added.
    """
    if not adapter:
        return contract(spec, x, weight.values, jnp.float32)
    inputs = inputs_of(spec)
    rows, outputs = x.shape[:-inputs], weight.values.shape[:-inputs]
    low, b = adapter
    flat = x.reshape(*rows, -1)
    matrices = [w.values.reshape(-1, n) for w, n in ((weight, flat.shape[-1]), (b, low.shape[-1]))]

    def kernel(x: jax.Array, low: jax.Array, weight: jax.Array, b: jax.Array) -> jax.Array:
        return products.product(x, weight, low, b)

    def otherwise(x: jax.Array, low: jax.Array, weight: jax.Array, b: jax.Array) -> jax.Array:
        return _of_last(x, weight) + _of_last(low, b)

    return _by_kernel(kernel, otherwise, [flat, low], matrices).reshape(*rows, *outputs)


def gated(
    x: jax.Array, gate: Turned, up: Turned, activation: Activation, *adapters: Any
) -> jax.Array:
    """act(gate's product) * up's in x's dtype, [rows..., F].

    Args:
      x: [rows..., D].
      gate, up: of [F, D].
      activation: of gate.
      adapters: none, or as in `product` low and B of gate's, then of up's.
    """
    lows, bs = adapters[::2], adapters[1::2]

    def kernel(x: jax.Array, *rest: jax.Array) -> jax.Array:
        lows, matrices = rest[: len(bs)], rest[len(bs) :]
        pairs = zip(lows, matrices[2:], strict=True)
        return products.gated(activation, x, *matrices[:2], *itertools.chain(*pairs))

    def otherwise(x: jax.Array, *rest: jax.Array) -> jax.Array:
        lows, matrices = rest[: len(bs)], rest[len(bs) :]
        sums = [_of_last(x, weight) for weight in matrices[:2]]
        for i, (low, b) in enumerate(zip(lows, matrices[2:], strict=True)):
            sums[i] += _of_last(low, b)
        made_gate, made_up = (one.astype(x.dtype) for one in sums)
        return activate(made_gate, made_up, activation)

    matrices = [w.values for w in (gate, up, *bs)]
    return _by_kernel(kernel, otherwise, [x, *lows], matrices)


def _by_kernel(
    kernel: Callable[..., jax.Array],
    otherwise: Callable[..., jax.Array],
    rows: Sequence[jax.Array],
    matrices: Sequence[jax.Array],
) -> jax.Array:
    """A function of rows [..., n] and matrices: [..., out], by a kernel where that can be.

    Args:
      kernel: takes rows as matrices.
      otherwise: the same function where there is no kernel, or one of every matrix for each of the
        roles of a vmap.
      rows, matrices: the arguments.
    """
    if not products.available() or rows[0].dtype.name not in products.FLOATS:
        return otherwise(*rows, *matrices)

    @jax.custom_batching.custom_vmap
    def run(rows: Sequence[jax.Array], matrices: Sequence[jax.Array]) -> jax.Array:
        flat = [one.reshape(-1, one.shape[-1]) for one in rows]
        return kernel(*flat, *matrices).reshape(*rows[0].shape[:-1], -1)

    @run.def_vmap
    def _(size: int, batched: Any, rows: Any, matrices: Any) -> Any:
        if all(batched[0]) and not any(batched[1]):  # so many more rows
            return run(rows, matrices), True
        each = [0 if b else None for b in itertools.chain(*batched)]
        return jax.vmap(otherwise, each)(*rows, *matrices), True

    return run(rows, matrices)


def _of_last(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [..., in] times [out, in] in float32."""
    letters = "ABCDE"[: x.ndim - 1]
    return of_rows(f"{letters}I,OI->{letters}O", x, matrix, jnp.float32)


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
