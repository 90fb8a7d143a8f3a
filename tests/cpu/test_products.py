"""The CPU's kernels against exact sums, on one device and on a mesh, and machines without them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from proxy_jax.cpu import products
from proxy_jax.sharding import make_mesh

needs_kernels = pytest.mark.skipif(
    not products.available(), reason="this CPU has no AVX-512, or the machine no C++ compiler"
)
DTYPES = ("float32", "bfloat16", "int8")
# Less than a register of every type, whole ones, and several chunks with a rest.
INPUTS = (1, 24, 64, 896, 1000, 7000)


def numbers(rng, shape, dtype):
    if dtype == "int8":
        return jnp.asarray(rng.integers(-128, 128, shape), jnp.int8)
    return jnp.asarray(rng.normal(size=shape), dtype)


def exact(x, weight):
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 150])
def test_products(dtype, inputs, rows):
    rng = np.random.default_rng(0)
    for outputs in (1, 61, 200):
        x, weight = numbers(rng, (rows, inputs), dtype), numbers(rng, (outputs, inputs), dtype)
        ours = jax.jit(products.product)(x, weight)
        assert ours.dtype == products.SUMS[dtype]
        tolerance = 0 if dtype == "int8" else 1e-6 * inputs
        np.testing.assert_allclose(ours, exact(x, weight), rtol=0, atol=tolerance)


@needs_kernels
def test_the_largest_integers():
    weight = jnp.full((7, 4096), -128, jnp.int8)
    for value in (-128, 127):
        made = products.product(jnp.full((5, 4096), value, jnp.int8), weight)
        assert np.all(np.asarray(made) == 4096 * value * -128)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_among_others(dtype):
    rng = np.random.default_rng(0)
    x, weight = numbers(rng, (170, 2000), dtype), numbers(rng, (500, 2000), dtype)
    whole = np.asarray(products.product(x, weight))
    for rows in (slice(3), slice(4, 5), slice(9, 42), slice(126, 130)):
        np.testing.assert_array_equal(products.product(x[rows], weight), whole[rows])


@needs_kernels
def test_what_is_not_finite_is_seen():
    x = jnp.ones((2, 100)).at[1, 70].set(jnp.nan)
    assert np.isnan(np.asarray(products.product(x, jnp.ones((9, 100))))).all(1).tolist() == [
        False,
        True,
    ]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["data", ("data", "fsdp")])
@pytest.mark.parametrize("inputs", [None, "fsdp"])
def test_on_eight_devices(dtype, inputs, rows):
    """Each device reads its own part of the weight, which stays there; rows come to it. Where
    inputs are cut, the sums are added."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rng = np.random.default_rng(0)
    given = numbers(rng, (8, 300), dtype), numbers(rng, (50, 300), dtype)
    specs = PartitionSpec(rows, None), PartitionSpec("tensor", inputs)
    x, weight = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(given, specs))  # noqa: B905
    program = jax.jit(products.product).lower(x, weight).compile()
    made = program(x, weight)
    np.testing.assert_allclose(made, exact(*given), rtol=0, atol=0 if dtype == "int8" else 1e-4)
    text = str(program.as_text())
    assert ("all-reduce(" in text) == (inputs is not None)
    gathered = re.findall(r"= \w+\[(\d+),\d+\]\S* all-gather\(", text)
    assert "50" not in gathered
    assert "25" not in gathered


@needs_kernels
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(products, "_CACHE", tmp_path)
    with pytest.warns(UserWarning, match="kernels for this CPU could not be compiled"):
        assert not products.available.__wrapped__()
    assert not list(tmp_path.iterdir())


def test_without_the_instructions(monkeypatch, recwarn):
    monkeypatch.setattr(products, "_INSTRUCTIONS", ("avx4096",))
    assert not products.available.__wrapped__()
    assert not recwarn
