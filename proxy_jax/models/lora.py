"""Low-rank adapters (LoRA, Hu et al. 2021): a weight W that acts as W + scale * A B.

Letters: R rank; the others as in layers.py. An adapted weight takes the place of the weight in the
params, so the model does not know of it: a product with it is x W + scale * (x A) B.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxy_jax.models import quantized, turned
from proxy_jax.models.activation import Activation, activate
from proxy_jax.models.einsum import dense
from proxy_jax.models.quantized import Quantized
from proxy_jax.models.turned import Turned

# Hugging Face's name of each linear layer: where its weight is, and how many of the weight's first
# axes are inputs.
MODULES = {
    "q_proj": ("attention", "q", 1),
    "k_proj": ("attention", "k", 1),
    "v_proj": ("attention", "v", 1),
    "o_proj": ("attention", "o", 2),
    "gate_proj": ("mlp", "gate", 1),
    "up_proj": ("mlp", "up", 1),
    "down_proj": ("mlp", "down", 1),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight and its adapter.

    Attributes:
      weight: of the base model, [in..., out...], or a `Quantized` or `Turned` one.
      a: [in..., R], or turned.
      b: [R, out...], or turned.
      scale: what A B is multiplied with, lora_alpha / R or lora_alpha / sqrt(R).
      first_only: of the roles of a vmap the first has the adapter, the others the weight alone.
        See `beside_nothing`.
      key: random key of dropout; None outside training.
      dropout: share of the adapter's inputs that are set to 0.
    """

    weight: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})
    first_only: bool = dataclasses.field(default=False, metadata={"static": True})
    key: Any = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})


Weight = jax.Array | Quantized | Turned | Adapted


def product(spec: str, x: jax.Array, weight: Weight) -> jax.Array:
    """einsum of activations and a weight, in float32.

    Args:
      spec: "x's letters,the weight's letters->the result's letters".
      x: in the dtype to compute in.
      weight: an array, or a weight that is quantised or turned, adapted, or both.
    """
    if isinstance(weight, Quantized):
        return quantized.product(spec, x, weight)
    if isinstance(weight, Turned):
        return turned.product(spec, x, weight)
    if not isinstance(weight, Adapted):
        return dense(spec, x, weight)
    if isinstance(weight.weight, Turned):
        return turned.product(spec, x, weight.weight, *_of_rank(spec, x, weight))
    whole = product(spec, x, weight.weight)

    def change(x: jax.Array, a: Any, b: Any) -> jax.Array:
        _, spec_b = _specs(spec)
        return product(spec_b, _low(spec, weight.scale, x, a), b)

    return whole + _of_roles(weight, change)(_seen(x, weight), weight.a, weight.b)


def gated(x: jax.Array, gate: Weight, up: Weight, activation: Activation) -> jax.Array:
    """act(x gate) * (x up), each step rounded to x's dtype: [B, T, F].

    Args:
      x: [B, T, D].
      gate, up: [D, F], as in `product`.
      activation: of gate.
    """
    spec = "BTD,DF->BTF"
    plain_gate, plain_up = (w.weight if isinstance(w, Adapted) else w for w in (gate, up))
    adapted = [w for w in (gate, up) if isinstance(w, Adapted)]
    if isinstance(plain_gate, Turned) and isinstance(plain_up, Turned) and len(adapted) != 1:
        adapters = itertools.chain(*(_of_rank(spec, x, w) for w in adapted))
        return turned.gated(x, plain_gate, plain_up, activation, *adapters)
    gates, ups = (product(spec, x, w).astype(x.dtype) for w in (gate, up))
    return activate(gates, ups, activation)


def _of_rank(spec: str, x: jax.Array, weight: Adapted) -> tuple[jax.Array, Any]:
    """scale * x A, and B."""
    low = functools.partial(_low, spec, weight.scale)
    return _of_roles(weight, low)(_seen(x, weight), weight.a), weight.b


def _specs(spec: str) -> tuple[str, str]:
    """The specs of the products with A and with B, from that with their weight."""
    left, right = spec.split("->")
    x_letters, w_letters = left.split(",")
    into = "".join(letter for letter in w_letters if letter in x_letters)
    out = "".join(letter for letter in w_letters if letter not in x_letters)
    kept = "".join(letter for letter in x_letters if letter not in into)
    return f"{x_letters},{into}R->{kept}R", f"{kept}R,R{out}->{right}"


def _low(spec: str, scale: float, x: jax.Array, a: Any) -> jax.Array:
    """scale * x A, in x's dtype."""
    spec_a, _ = _specs(spec)
    return (scale * product(spec_a, x, a)).astype(x.dtype)


def _seen(x: jax.Array, weight: Adapted) -> jax.Array:
    return x if weight.key is None else _dropout(x, weight.dropout, weight.key)


def _of_roles(weight: Adapted, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function of x and an adapter's matrices; where only the first of a vmap's roles has the
    adapter, that of the first, and 0 for the others, which are not multiplied."""
    if not weight.first_only:
        return function
    of_one = jax.custom_batching.custom_vmap(function)

    @of_one.def_vmap
    def _(roles: int, batched: Sequence[Any], x: Any, *matrices: Any) -> tuple[jax.Array, bool]:
        assert jax.tree.leaves(batched) == [True, *[False] * len(matrices)]
        first = function(x[0], *matrices)
        is_first = jnp.asarray(np.arange(roles) == 0, first.dtype)
        return jnp.expand_dims(is_first, range(1, 1 + first.ndim)) * first[None], True

    return of_one


def attach(params: Any, adapter: Any, scale: Any) -> Any:
    """Puts an adapter's matrices beside the weights they adapt.

    Args:
      params: a model's parameters.
      adapter: a tree like params that has {"a", "b"} in place of the adapted weights and nothing
        in place of the others.
      scale: what A B is multiplied with, one number for all weights, or a tree like adapter with
        one in place of each {"a", "b"}.
    """
    if isinstance(params, tuple):
        by_layer = scale if isinstance(scale, tuple) else (scale,) * len(params)
        layers = zip(params, adapter, by_layer, strict=True)
        return tuple(attach(*layer) for layer in layers)
    if not isinstance(params, dict):
        return Adapted(params, adapter["a"], adapter["b"], scale)
    by_key = scale if isinstance(scale, dict) else dict.fromkeys(adapter, scale)
    return {
        key: attach(value, adapter[key], by_key[key]) if key in adapter else value
        for key, value in params.items()
    }


def merge(params: Any) -> Any:
    """Adds each adapter to its weight: params of plain arrays that act as the adapted ones.

    W + scale * A B is computed in float32 and rounded once, to the weight's dtype.

    Args:
      params: a model's parameters or any part of them, layers stacked or not.
    """

    def whole(weight: Any, a: Any, b: Any, scale: float) -> jax.Array:
        a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        change = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (jnp.asarray(weight, jnp.float32) + scale * change).astype(weight.dtype)

    def replace(leaf: Any) -> Any:
        if not is_adapted(leaf):
            return leaf
        run = jax.vmap(whole, in_axes=(0, 0, 0, None)) if _is_stacked(leaf) else whole
        return run(leaf.weight, leaf.a, leaf.b, leaf.scale)

    return jax.tree.map(replace, params, is_leaf=is_adapted)


def beside_nothing(params: Any) -> Any:
    """Adapters that serve two roles at once: in place for the first, absent for the second.

    The two are the rows of a vmap, the params the same for both.
    """
    mark = lambda leaf: dataclasses.replace(leaf, first_only=True) if is_adapted(leaf) else leaf  # noqa: E731
    return jax.tree.map(mark, params, is_leaf=is_adapted)


def init_adapter(params: Any, modules: Sequence[str], rank: int, key: jax.Array) -> dict[str, Any]:
    """A fresh adapter, which changes nothing yet: A uniform in 1 / sqrt(inputs), B zero (PEFT's).

    Args:
      params: of the base model, layers stacked or not; shapes are enough.
      modules: Hugging Face names of the linear layers to adapt, keys of MODULES.
      rank: R.
      key: random key.

    Returns:
      {"layers": ...} in float32, for `attach`.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        keys = jax.random.split(key, len(layers))
        return {
            "layers": tuple(
                _init_layer(layer, modules, rank, k, 0)
                for layer, k in zip(layers, keys, strict=True)
            )
        }
    return {"layers": _init_layer(layers, modules, rank, key, 1)}


def _init_layer(
    layer: Any, modules: Sequence[str], rank: int, key: jax.Array, lead: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module, own in zip(modules, jax.random.split(key, len(modules)), strict=True):
        part, name, inputs = MODULES[module]
        shape = layer[part][name].shape
        stacked, into, out = shape[:lead], shape[lead : lead + inputs], shape[lead + inputs :]
        bound = 1 / math.sqrt(math.prod(into))
        found.setdefault(part, {})[name] = {
            "a": jax.random.uniform(own, (*stacked, *into, rank), minval=-bound, maxval=bound),
            "b": jnp.zeros((*stacked, rank, *out)),
        }
    return found


def with_dropout(params: Any, rate: float, key: jax.Array) -> Any:
    """Gives every adapter of the params a dropout rate and a random key of its own."""
    layers = params["layers"]
    stacked = isinstance(layers, dict)
    leaves, structure = jax.tree.flatten(params, is_leaf=is_adapted)
    for i, leaf in enumerate(leaves):
        if is_adapted(leaf):
            own = jax.random.fold_in(key, i)
            own = jax.random.split(own, leaf.a.shape[0]) if stacked else own
            leaves[i] = dataclasses.replace(leaf, key=own, dropout=rate)
    return jax.tree.unflatten(structure, leaves)


def _dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def _is_stacked(leaf: Adapted) -> bool:
    # A leading axis for layers is one of weight, A and B; R is one of A and B only.
    return leaf.a.ndim + leaf.b.ndim - 2 > leaf.weight.ndim


def is_adapted(leaf: Any) -> bool:
    """Whether a leaf of the params is an adapted weight."""
    return isinstance(leaf, Adapted)
