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
SOME_ROWS = (slice(3), slice(4, 5), slice(9, 42), slice(126, 130))


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


def adapter(rng, rows, outputs, rank, dtype):
    return numbers(rng, (rows, rank), dtype), numbers(rng, (outputs, rank), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", products.FLOATS)
@pytest.mark.parametrize("inputs", [24, 896, 1000, 7000])
@pytest.mark.parametrize("rows", [1, 7, 150])
def test_adapted_products(dtype, inputs, rows):
    rng = np.random.default_rng(0)
    for outputs, rank in ((1, 16), (61, 1), (200, 40), (64, 64)):
        x, weight = numbers(rng, (rows, inputs), dtype), numbers(rng, (outputs, inputs), dtype)
        low, b = adapter(rng, rows, outputs, rank, dtype)
        ours = jax.jit(products.product)(x, weight, low, b)
        expected = exact(x, weight) + exact(low, b)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * (inputs + rank))


def exact_gated(activation, gate, up, dtype):
    """act(gate) * up of exact sums, rounded where the layer does."""

    def rounded(numbers):
        return np.asarray(jnp.asarray(numbers, jnp.float32).astype(dtype), np.float64)

    gate, up = rounded(gate), rounded(up)
    if activation == "silu":
        act = gate / (1 + np.exp(-gate))
    else:
        act = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return rounded(act) * up


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", products.FLOATS)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_gated_layers(activation, dtype, adapted, rows):
    rng = np.random.default_rng(0)
    for inputs, outputs in ((24, 61), (896, 200), (1000, 1), (2000, 130)):
        x = numbers(rng, (rows, inputs), dtype)
        # Sums from -6 to 6, where activations bend.
        weights = [numbers(rng, (outputs, inputs), dtype) / 16 for _ in range(2)]
        adapters = [adapter(rng, rows, outputs, 16, dtype) for _ in range(2 * adapted)]
        gate, up = (exact(x, w) for w in weights)
        if adapted:
            gate, up = (s + exact(*a) for s, a in zip((gate, up), adapters, strict=True))
        flat = [matrix for pair in adapters for matrix in pair]
        ours = jax.jit(products.gated, static_argnums=0)(activation, x, *weights, *flat)
        assert ours.dtype == x.dtype
        # In bfloat16 each of gate, up and the result may be rounded to either side.
        expected, close = exact_gated(activation, gate, up, dtype), 1e-5
        if dtype == "bfloat16":
            close = 3 * 2.0**-8
        np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=close, atol=close)


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_from_end_to_end(activation):
    """As close as float32's rounding of the exponent allows; what is infinite or not a number,
    too."""
    ends = np.asarray([0, np.inf, np.nan, 1e-38, 3e38, -3e38], np.float32)
    gates = np.concatenate([np.linspace(-120, 120, 4001, dtype=np.float32), ends])
    rows = jnp.asarray(gates)[:, None]
    ours = np.asarray(products.gated(activation, rows, jnp.ones((1, 1)), jnp.ones((1, 1))))[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        wide = gates.astype(np.float64)
        s = wide
        if activation == "gelu_tanh":
            s = 2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
        expected = (wide * (wide / (1 + np.exp(-s)))).astype(np.float32)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(ours[~finite], expected[~finite])
        close = 2.0**-23 * (4 + np.minimum(np.abs(s), 104)) * np.abs(expected) + 1e-30
        assert np.all(np.abs(ours - expected)[finite] <= close[finite])


@needs_kernels
@pytest.mark.parametrize("dtype", products.FLOATS)
@pytest.mark.parametrize(
    "sizes", [(1, 256, 256, 12, 2, 128), (2, 50, 90, 4, 4, 64), (3, 5, 301, 6, 2, 24)]
)
def test_attention(dtype, sizes):
    B, T, S, N, K, H = sizes
    rng = np.random.default_rng(0)
    q = numbers(rng, (B, T, N, H), dtype)
    keys, values = (numbers(rng, (B, K, S, H), dtype) for _ in range(2))
    # Causal, with holes; each query sees something.
    distance = S - T + np.arange(T)[:, None] - np.arange(S)
    mask = (distance >= 0) & ((rng.random((B, T, S)) < 0.8) | (distance == 0))
    run = jax.jit(products.attend, static_argnums=4)
    ours = np.asarray(run(q, keys, values, jnp.asarray(mask), 0.3), np.float64)
    wide_q, wide_k, wide_v = (np.asarray(x, np.float64) for x in (q, keys, values))
    wide_q = wide_q.reshape(B, T, K, N // K, H)
    scores = 0.3 * np.einsum("btkgh,bksh->bktgs", wide_q, wide_k)
    shares = np.exp(np.where(mask[:, None, :, None], scores, -np.inf))
    shares /= shares.sum(-1, keepdims=True)
    expected = np.einsum("bktgs,bksh->btkgh", shares, wide_v).reshape(B, T, N, H)
    # In bfloat16 shares and the result are rounded.
    close = 1e-5 if dtype == "float32" else 2.0**-8 * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=close)
    # Tokens by themselves, and what nobody may see.
    some = slice(T // 3, T // 3 + 4)
    few = run(q[:, some], keys, values, jnp.asarray(mask[:, some]), 0.3)
    np.testing.assert_array_equal(np.asarray(few, np.float64), ours[:, some])
    spoilt = keys.at[:, :, -1].set(jnp.nan), values.at[:, :, -1].set(7)
    first = slice(0, T - 1)
    few = run(q[:, first], *spoilt, jnp.asarray(mask[:, first]), 0.3)
    np.testing.assert_array_equal(np.asarray(few, np.float64), ours[:, first])
    broken = np.asarray(run(q, *spoilt, jnp.asarray(mask), 0.3), np.float64)
    assert np.all(np.isnan(broken[:, -1]))


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
    for rows in SOME_ROWS:
        np.testing.assert_array_equal(products.product(x[rows], weight), whole[rows])


@needs_kernels
@pytest.mark.parametrize("dtype", products.FLOATS)
def test_a_row_of_an_adapted_layer_is_the_same_among_others(dtype):
    rng = np.random.default_rng(0)
    x, low = numbers(rng, (300, 2000), dtype), numbers(rng, (300, 16), dtype)
    gate, up = (numbers(rng, (500, 2000), dtype) / 16 for _ in range(2))
    b = numbers(rng, (500, 16), dtype)
    whole = np.asarray(products.gated("silu", x, gate, up, low, b, low, b))
    for rows in (*SOME_ROWS, slice(250, 260)):
        few = products.gated("silu", x[rows], gate, up, low[rows], b, low[rows], b)
        np.testing.assert_array_equal(few, whole[rows])


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
@pytest.mark.parametrize("dtype", products.FLOATS)
@pytest.mark.parametrize("inputs", [None, "fsdp"])
@pytest.mark.parametrize("adapted", [False, True])
def test_layers_on_eight_devices(dtype, inputs, adapted):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rng = np.random.default_rng(0)

    def put(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    x = numbers(rng, (8, 300), dtype)
    gate, up = (numbers(rng, (50, 300), dtype) / 16 for _ in range(2))
    adapters = [adapter(rng, 8, 50, 16, dtype) for _ in range(2 * adapted)]
    cut = [put(x, "data", None), *(put(w, "tensor", inputs) for w in (gate, up))]
    cut += [put(matrix) for pair in adapters for matrix in pair]
    program = jax.jit(products.gated, static_argnums=0).lower("silu", *cut).compile()
    of_gate, of_up = exact(x, gate), exact(x, up)
    if adapted:
        of_gate, of_up = of_gate + exact(*adapters[0]), of_up + exact(*adapters[1])
    close = 3 * 2.0**-8 if dtype == "bfloat16" else 1e-5
    made, expected = program(*cut), exact_gated("silu", of_gate, of_up, dtype)
    np.testing.assert_allclose(np.asarray(made, np.float64), expected, rtol=close, atol=close)
    text = str(program.as_text())
    assert ("all-reduce(" in text) == (inputs is not None)
    assert "all-gather(" not in text


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
