"""Adapted weights: products and gated layers of one role or two, against exact sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxy_jax.cpu import products
from proxy_jax.models import lora
from proxy_jax.models.lora import Adapted, beside_nothing
from proxy_jax.models.turned import turn

D, F, RANK, SCALE = 24, 70, 3, 0.7


@pytest.fixture(params=["kernels", "XLA", "inputs first"])
def store(request, monkeypatch):
    """How weights and adapters are stored, with so many axes of inputs, and who multiplies."""
    if request.param == "XLA":
        monkeypatch.setattr(products, "available", lambda: False)
    elif request.param == "kernels" and not products.available():
        pytest.skip("this machine has no kernels")
    return (lambda array, inputs: array) if request.param == "inputs first" else turn


def numbers(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def adapted(rng, store, inputs, outputs, rank=RANK, scale=SCALE):
    """A weight with an adapter, both as stored and what they make in float64."""
    weight, a = numbers(rng, *inputs, *outputs), numbers(rng, *inputs, rank)
    b = numbers(rng, rank, *outputs)
    n = len(inputs)
    stored = Adapted(store(weight, n), store(a, n), store(b, 1), scale)
    plain = np.asarray(weight, np.float64)
    return stored, plain, plain + scale * np.tensordot(np.float64(a), np.float64(b), 1)


def of_roles(roles, function, weights):
    """A function of x and weights; of two roles, of which the first alone has the adapters."""
    if not roles:
        return function, weights
    axes = (0, *[None] * len(weights))
    return jax.vmap(function, axes), [beside_nothing(weight) for weight in weights]


@pytest.mark.parametrize("roles", [0, 2], ids=["one role", "two roles"])
@pytest.mark.parametrize("rows", [(1, 1), (5, 3)], ids=["one row", "rows"])
@pytest.mark.parametrize("spec", ["BTD,DNH->BTNH", "BTNH,NHD->BTD"])
def test_product(store, spec, rows, roles):
    rng = np.random.default_rng(0)
    inputs, outputs = ((4, 6), (D,)) if "BTNH," in spec else ((D,), (4, 6))
    weight, plain, whole = adapted(rng, store, inputs, outputs)
    x = numbers(rng, *[roles] * bool(roles), *rows, *inputs)
    run, weights = of_roles(roles, functools.partial(lora.product, spec), [weight])
    ours = jax.jit(run)(x, *weights)
    wide = np.asarray(x, np.float64)
    expected = np.einsum(spec, wide[0] if roles else wide, whole)
    if roles:
        expected = np.stack([expected, np.einsum(spec, wide[1], plain)])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("roles", [0, 2], ids=["one role", "two roles"])
@pytest.mark.parametrize("tuned", [(), ("gate",), ("gate", "up")], ids=["none", "gate", "both"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(store, activation, tuned, roles):
    rng = np.random.default_rng(0)
    weights, plain, whole = {}, {}, {}
    for name, rank, scale in (("gate", RANK, SCALE), ("up", 2 * RANK - 1, 2 * SCALE)):
        weights[name], plain[name], whole[name] = adapted(rng, store, (D,), (F,), rank, scale)
        if name not in tuned:
            weights[name], whole[name] = weights[name].weight, plain[name]
    x = numbers(rng, *[roles] * bool(roles), 2, 5, D) / 8  # activations bend near 0

    def layer(x, gate, up):
        return lora.gated(x, gate, up, activation)

    run, given = of_roles(roles, layer, list(weights.values()))
    ours = jax.jit(run)(x, *given)

    def exact(x, matrices):
        gate, up = (x @ matrices[name] for name in ("gate", "up"))
        inner = gate if activation == "silu" else 1.5957691216 * (gate + 0.044715 * gate**3)
        return gate / (1 + np.exp(-inner)) * up

    wide = np.asarray(x, np.float64)
    expected = exact(wide[0] if roles else wide, whole)
    if roles:
        expected = np.stack([expected, exact(wide[1], plain)])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)
