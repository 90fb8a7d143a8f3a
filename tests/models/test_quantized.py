"""8-bit weights: rounding and products as a numpy loop does them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxy_jax.models import quantized
from proxy_jax.models.quantized import Quantized, quantise

SIZES = {"B": 3, "T": 2, "D": 24, "N": 4, "H": 6, "F": 10}


def rounded(vector):
    """Integers and their scale, of one output's weights or one token's activations."""
    scale = np.float32(max(abs(float(v)) for v in vector.ravel()) or 1.0) / np.float32(127)
    return np.asarray([round(float(v / scale)) for v in vector.ravel()]), scale


@pytest.mark.parametrize("spec", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF"])
@pytest.mark.parametrize("rows", [(3, 2), (1, 1)], ids=["six rows", "one row"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product(spec, rows, dtype):
    rng = np.random.default_rng(0)
    sizes = SIZES | dict(zip("BT", rows, strict=True))
    operands, result = spec.split("->")
    left, right = operands.split(",")
    x = rng.normal(size=[sizes[a] for a in left]).astype(np.float32)
    x[0, 0] *= 30.0  # one token's large numbers do not coarsen the others'
    x = np.asarray(jnp.asarray(x, dtype), np.float32)
    inputs = sum(a in left for a in right)
    weight = rng.normal(size=[sizes[a] for a in right]).astype(np.float32)
    turned = np.moveaxis(weight, range(inputs), range(-inputs, 0))
    outputs = turned.ndim - inputs
    values, scales = quantise(turned, outputs)
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)
    flat = turned.reshape(scales.size, -1)
    expected = np.zeros((x.shape[0] * x.shape[1], scales.size), np.float32)
    for row, token in enumerate(x.reshape(len(expected), -1)):
        x_whole, x_scale = rounded(token)
        for column, weights in enumerate(flat):
            w_whole, w_scale = rounded(weights)
            expected[row, column] = x_scale * w_scale * int(x_whole @ w_whole)
    run = jax.jit(quantized.product, static_argnums=0)
    ours = run(spec, jnp.asarray(x, dtype), Quantized(jnp.asarray(values), jnp.asarray(scales)))
    assert ours.shape == tuple(sizes[a] for a in result)
    np.testing.assert_allclose(ours.reshape(expected.shape), expected, rtol=1e-6)
    exact = np.einsum(spec, x, weight)
    error = np.abs(np.asarray(ours) - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.02


def test_zeros_and_what_is_not_finite():
    values, scales = quantise(np.zeros((2, 3), np.float32), 1)
    weight = Quantized(jnp.asarray(values), jnp.asarray(scales))
    out = quantized.product("BTD,DF->BTF", jnp.ones((1, 1, 3)), weight)
    np.testing.assert_array_equal(out, np.zeros((1, 1, 2)))
    weight = Quantized(jnp.ones((2, 3), jnp.int8), jnp.ones(2))
    for bad in (np.nan, np.inf):
        out = quantized.product("BTD,DF->BTF", jnp.asarray([[[1.0, bad, 2.0]]]), weight)
        assert not np.isfinite(out).any()
