"""Weights stored as 8-bit integers, and their products with activations.

Letters: as in layers.py; "in" and "out" are a weight's axes that are summed over, and the others.

A weight W[in, out] is stored as integers q and one scale an output, W = q * scale[out], with
scale = max |W[:, out]| / 127. In a product each token's activations are rounded the same way, with
the token's own scale, and int8 is multiplied with int8 and summed in int32, exactly; both scales
are applied in float32 (Dettmers et al. 2022, vector-wise quantisation). The embedding, a head tied
to it, norms and biases stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxy_jax.models import turned
from proxy_jax.models.turned import INPUTS, Turned
from proxy_jax.sharding import is_axes

_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight of 8 bits.

    Attributes:
      values: [out..., in...] int8; outputs come first as in turned.py.
      scales: [out...] float32.
    """

    values: Any
    scales: Any

    @property
    def ndim(self) -> int:
        """That of the weight, as of an array."""
        return self.values.ndim


def quantise(weight: Any, outputs: int) -> tuple[Any, Any]:
    """Rounds a weight to values and scales.

    Args:
      weight: [out..., in...], floating-point, of numpy or JAX, as the values and scales are then.
      outputs: how many axes out is.
    """
    xp = weight.__array_namespace__()
    full = weight.astype(np.float32)
    inputs = tuple(range(outputs, weight.ndim))
    scales = _scale(xp.abs(full).max(axis=inputs))
    return xp.rint(full / xp.expand_dims(scales, inputs)).astype(np.int8), scales


def product(spec: str, x: jax.Array, weight: Quantized) -> jax.Array:
    """einsum of activations and a quantised weight, in float32.

    Args:
      spec: as in turned.contract.
      x: activations, in any floating-point dtype.
      weight: see `Quantized`.
    """
    inputs = tuple(range(-turned.inputs_of(spec), 0))
    full = x.astype(jnp.float32)
    scale = _scale(jnp.max(jnp.abs(full), axis=inputs, keepdims=True))
    rounded = jnp.rint(full / scale).astype(jnp.int8)
    total = turned.contract(spec, rounded, weight.values, jnp.int32).astype(jnp.float32)
    rows = total.ndim - weight.scales.ndim
    of_tokens = scale.reshape(*scale.shape[:rows], *(1 for _ in weight.scales.shape))
    return total * (of_tokens * weight.scales[(None,) * rows])


def map_weights(
    function: Callable[[Any, int], Any], tree: Any, *, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Maps function(leaf, inputs) over the weights of a tree like a model's params that are stored
    in 8 bits; the other leaves stay."""

    def of_path(path: Sequence[Any], leaf: Any) -> Any:
        name = getattr(path[-1], "key", None)
        return function(leaf, INPUTS[name]) if name in INPUTS else leaf

    return jax.tree_util.tree_map_with_path(of_path, tree, is_leaf=is_leaf)


def quantized_axes(axes: Any) -> Any:
    """Logical axes of a model's params with 8-bit weights, from those of its plain params."""

    def of_weight(names: tuple[str | None, ...], inputs: int) -> Quantized:
        return Quantized(names[inputs:] + names[:inputs], names[inputs:])

    return map_weights(of_weight, axes, is_leaf=is_axes)


def turned_axes(axes: Any) -> Any:
    """Logical axes of a model's params with turned weights, from those of its plain params."""

    def of_weight(names: tuple[str | None, ...], inputs: int) -> Turned:
        return Turned(names[inputs:] + names[:inputs])

    return map_weights(of_weight, axes, is_leaf=is_axes)


def quantized_shapes(params: Any) -> Any:
    """Shapes and dtypes of a model's params with 8-bit weights, from those of its plain params."""

    def of_weight(leaf: Any, inputs: int) -> Quantized:
        outputs = leaf.shape[inputs:]
        return Quantized(
            jax.ShapeDtypeStruct(outputs + leaf.shape[:inputs], jnp.int8),
            jax.ShapeDtypeStruct(outputs, jnp.float32),
        )

    return map_weights(of_weight, params)


def _scale(largest: Any) -> Any:
    """What the integers count in. Not finite where the numbers are not, so that it is seen."""
    return (largest + (largest == 0)) / np.float32(_LARGEST)
