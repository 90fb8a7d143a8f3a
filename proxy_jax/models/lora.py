"""Low-rank adapters (LoRA, Hu et al. 2021): a weight W that acts as W + scale * A B.

Letters: R rank; the others as in layers.py. An adapted weight takes the place of the weight in the
params, so the model does not know of it: a product with it is x W + scale * (x A) B.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight and its adapter.

    Attributes:
      weight: of the base model, [in..., out...].
      a: [in..., R].
      b: [R, out...].
      scale: lora_alpha / R.
    """

    weight: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})


def product(spec: str, x: jax.Array, weight: jax.Array | Adapted) -> jax.Array:
    """einsum of activations and a weight, in float32.

    Args:
      spec: "x's letters,the weight's letters->the result's letters".
      x: in the dtype to compute in.
      weight: an array or an adapted weight.
    """
    if not isinstance(weight, Adapted):
        return jnp.einsum(spec, x, weight, preferred_element_type=jnp.float32)
    whole = jnp.einsum(spec, x, weight.weight, preferred_element_type=jnp.float32)
    left, right = spec.split("->")
    x_letters, w_letters = left.split(",")
    into = "".join(letter for letter in w_letters if letter in x_letters)
    out = "".join(letter for letter in w_letters if letter not in x_letters)
    kept = "".join(letter for letter in x_letters if letter not in into)
    low = jnp.einsum(
        f"{x_letters},{into}R->{kept}R", x, weight.a, preferred_element_type=jnp.float32
    )
    high = jnp.einsum(
        f"{kept}R,R{out}->{right}",
        low.astype(x.dtype),
        weight.b,
        preferred_element_type=jnp.float32,
    )
    return whole + weight.scale * high


def attach(params: Any, adapter: Any, scale: float) -> Any:
    """Puts an adapter's matrices beside the weights they adapt.

    Args:
      params: a model's parameters.
      adapter: a tree like params that has {"a", "b"} in place of the adapted weights and nothing
        in place of the others.
      scale: lora_alpha / R.
    """
    if isinstance(params, tuple):
        return tuple(attach(p, a, scale) for p, a in zip(params, adapter, strict=True))
    if not isinstance(params, dict):
        return Adapted(params, adapter["a"], adapter["b"], scale)
    return {
        key: attach(value, adapter[key], scale) if key in adapter else value
        for key, value in params.items()
    }


def beside_nothing(params: Any) -> Any:
    """Adapters that serve two roles at once: theirs for the first, zeros for the second.

    Gives a and b a leading axis of 2; the weights have none, and are read once for both roles.
    """

    def pair(leaf: Any) -> Any:
        if not isinstance(leaf, Adapted):
            return leaf
        a, b = (jnp.stack([matrix, jnp.zeros_like(matrix)]) for matrix in (leaf.a, leaf.b))
        return dataclasses.replace(leaf, a=a, b=b)

    return jax.tree.map(pair, params, is_leaf=is_adapted)


def role_axes(params: Any) -> Any:
    """The vmap axes of params with `beside_nothing` adapters: 0 for these, None for weights."""

    def axes(leaf: Any) -> Any:
        return dataclasses.replace(leaf, weight=None, a=0, b=0) if is_adapted(leaf) else None

    return jax.tree.map(axes, params, is_leaf=is_adapted)


def is_adapted(leaf: Any) -> bool:
    """Whether a leaf of the params is an adapted weight."""
    return isinstance(leaf, Adapted)
