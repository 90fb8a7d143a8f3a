"""Weights with their outputs first: the products, and what a decode step on CPU copies of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxy_jax.cpu import products
from proxy_jax.models import cache as kv
from proxy_jax.models import turned
from proxy_jax.models.decoder import apply, init
from proxy_jax.models.hf_config import config_from_hf
from proxy_jax.models.quantized import Quantized, map_weights, quantise
from proxy_jax.models.turned import turn

SIZES = {"D": 24, "N": 4, "H": 6, "F": 10}
ROWS, SLOTS = (1, 8, 40), 512
CONFIG = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 20000,
        "hidden_size": 256,
        "intermediate_size": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
)


@pytest.fixture(params=["kernels", "XLA"])
def by(request, monkeypatch):
    """Who multiplies on CPU."""
    if request.param == "XLA":
        monkeypatch.setattr(products, "available", lambda: False)
    elif not products.available():
        pytest.skip("this machine has no kernels")


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("spec", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF"])
@pytest.mark.parametrize("rows", [(1, 1), (3, 2), (20, 3)], ids=["one row", "few", "many"])
@pytest.mark.parametrize("roles", [0, 2], ids=["one role", "two roles"])
def test_product(spec, rows, roles):
    rng = np.random.default_rng(0)
    sizes = SIZES | dict(zip("BT", rows, strict=True)) | {"R": roles}
    letters, w_letters = spec.split("->")[0].split(",")
    first = "R" if roles else ""
    x = jnp.asarray(rng.normal(size=[sizes[a] for a in first + letters]), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=[sizes[a] for a in w_letters]), jnp.bfloat16)
    stored = turn(weight, turned.inputs_of(spec))
    run = functools.partial(turned.product, spec)
    ours = jax.jit(jax.vmap(run, (0, None)) if roles else run)(x, stored)
    operands, result = spec.split("->")
    exact = np.einsum(
        f"{first}{operands}->{first}{result}", *(np.asarray(a, np.float64) for a in (x, weight))
    )
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


def to_8_bits(leaf, inputs):
    weight = np.moveaxis(np.asarray(leaf, np.float32), range(inputs), range(-inputs, 0))
    return Quantized(*map(jnp.asarray, quantise(weight, weight.ndim - inputs)))


@pytest.mark.usefixtures("by")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU compiler")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("store", [turn, to_8_bits])
def test_steps_copy_neither_weights_nor_caches(rows, store):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init(CONFIG, jax.random.key(0)))
    params = map_weights(store, params)
    cache = kv.KVCache.zeros(CONFIG, rows, SLOTS, jnp.bfloat16, stacked=False)

    @functools.partial(jax.jit, donate_argnums=1)
    def steps(params, cache, tokens):
        def step(_, carry):
            cache, tokens = carry
            logits, cache = apply(CONFIG, params, tokens[:, None], cache.lengths[:, None], cache)
            assert cache is not None
            cache = dataclasses.replace(cache, lengths=cache.lengths + 1)
            return cache, jnp.argmax(logits[:, 0], axis=-1)

        return jax.lax.fori_loop(0, 4, step, (cache, tokens))

    compiled = steps.lower(params, cache, jnp.zeros(rows, jnp.int32)).compile()
    # The logits, in one copy, are most of it, and of one row some of the attention (in JAX 0.11 a
    # layer's keys and values): embedding, weights and caches are larger than that.
    logits = rows * CONFIG.vocab_size * 4
    analysis: Any = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < 1.25 * logits + 2**19
