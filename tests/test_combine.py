"""The logit arithmetic against the formulas, written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxy_jax.combine import combine, fit

ROWS, SIZE = 6, 50
RANDOM = np.random.default_rng(1)


def logits(size=SIZE):
    return (8.0 * RANDOM.standard_normal((ROWS, size))).astype(np.float32)


BASE, PLUS, MINUS = logits(), logits(), logits()
ALPHA = np.asarray([1.0, 0.0, -0.5, 0.3, 2.0, 7.5], np.float32)
ALL = np.ones(SIZE, bool)
combined = jax.jit(combine)
assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-5)


def wide(x):
    return np.asarray(x, np.float64)


def test_formula_with_a_coefficient_a_row():
    expected = wide(BASE) + wide(ALPHA)[:, None] * (wide(PLUS) - wide(MINUS))
    got = combined(BASE, [(PLUS, MINUS, ALPHA)], ALL)
    assert got.dtype == jnp.float32
    assert_close(got, expected)


def test_scale_form():
    alpha, beta = np.float32(0.8), np.float32(1.7)
    minus = wide(MINUS)
    expected = minus + wide(alpha) * (PLUS - minus) + wide(beta) * (BASE - minus)
    offsets = [(PLUS, MINUS, np.full(ROWS, alpha)), (BASE, MINUS, np.full(ROWS, beta - 1))]
    assert_close(combined(BASE, offsets, ALL), expected)
    assert_close(combined(BASE, offsets[::-1], ALL), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_identities_bit_for_bit(dtype):
    """Logits of half-precision models come in float32, with few bits set."""
    base, plus, minus = (jnp.asarray(x, dtype).astype(jnp.float32) for x in (BASE, PLUS, MINUS))
    zero = np.zeros(ROWS, np.float32)
    np.testing.assert_array_equal(combined(base, [(plus, minus, zero)], ALL), base)
    np.testing.assert_array_equal(combined(base, [(plus, plus, ALPHA)], ALL), base)
    np.testing.assert_array_equal(combined(base, [], ALL), base)


def test_equal_base_and_antiexpert_give_the_expert():
    assert_close(combined(BASE, [(PLUS, BASE, np.ones(ROWS, np.float32))], ALL), PLUS)


def test_ids_that_are_not_shared_keep_the_base():
    shared = RANDOM.random(SIZE) < 0.6
    got = np.asarray(combined(BASE, [(PLUS, MINUS, ALPHA)], shared))
    np.testing.assert_array_equal(got[:, ~shared], BASE[:, ~shared])
    np.testing.assert_array_equal(
        got, np.where(shared, combined(BASE, [(PLUS, MINUS, ALPHA)], ALL), BASE)
    )


@pytest.mark.parametrize(("plus_size", "minus_size"), [(57, 57), (43, 43), (57, 43), (43, 57)])
def test_models_of_other_sizes(plus_size, minus_size):
    plus, minus = logits(plus_size), logits(minus_size)
    both = min(plus_size, minus_size, SIZE)
    shared = np.arange(SIZE) < both
    got = np.asarray(combined(BASE, [(plus, minus, ALPHA)], shared))
    assert got.shape == (ROWS, SIZE)
    np.testing.assert_array_equal(got[:, both:], BASE[:, both:])
    offset = wide(ALPHA)[:, None] * (wide(plus)[:, :both] - wide(minus)[:, :both])
    assert_close(got[:, :both], wide(BASE)[:, :both] + offset)


def test_fit():
    x = jnp.arange(6.0).reshape(2, 3)
    assert fit(x, 2).tolist() == [[0, 1], [3, 4]]
    assert fit(x, 3) is x or fit(x, 3).tolist() == x.tolist()
    assert fit(x, 5).tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]]
