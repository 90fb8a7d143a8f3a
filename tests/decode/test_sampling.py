"""Truncation against transformers' warpers, and draws against their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from decode.sampling import Sampling, Truncation, draw, keep, row_keys

LOGITS = (3.0 * np.random.default_rng(0).standard_normal((64, 90))).astype(np.float32)
WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.31},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"top_k": 9, "top_p": 0.6},
        {"top_k": 30, "top_p": 0.95, "min_p": 0.02},
        {"top_k": 3, "min_p": 0.5},
        {"top_p": 0.4, "min_p": 0.3},
    ],
    ids=str,
)
def test_truncation(settings):
    scores = torch.tensor(LOGITS)
    for name, value in settings.items():  # in the order of Truncation's fields
        scores = WARPERS[name](value)(None, scores)
    kept = np.asarray(keep(jnp.asarray(LOGITS), Truncation(**settings)))
    np.testing.assert_array_equal(kept, np.isfinite(scores.numpy()))
    assert kept.any(axis=-1).all()


def test_the_token_that_crosses_p_is_kept():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    for p, count in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.97, 4)):
        assert int(keep(logits, Truncation(top_p=p)).sum()) == count, p


def test_what_is_excluded_stays_excluded():
    logits = jnp.asarray([[1.0, -jnp.inf, 0.5, -jnp.inf]])
    keys = jax.random.split(jax.random.key(0), 200)
    sampling = Sampling(5.0, Truncation(top_k=3, top_p=0.999))
    drawn = draw(jnp.broadcast_to(logits, (200, 4)), sampling, keys)
    assert set(np.asarray(drawn).tolist()) == {0, 2}


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_frequencies(temperature):
    """Pearson's chi-square of 20,000 draws; 25 is beyond the 0.999 quantile of 7 degrees."""
    count, logits = 20_000, LOGITS[0, :8] / 2
    keys = jax.random.split(jax.random.key(1), count)
    batch = jnp.broadcast_to(jnp.asarray(logits), (count, 8))
    drawn = np.bincount(np.asarray(draw(batch, Sampling(temperature), keys)), minlength=8)
    wanted = np.exp(logits / temperature) / np.exp(logits / temperature).sum() * count
    assert ((drawn - wanted) ** 2 / wanted).sum() < 25


def test_draws_depend_on_seed_row_and_position_alone():
    def keys(seed, rows, positions):
        rows, positions = jnp.asarray(rows, jnp.uint32), jnp.asarray(positions)
        made = row_keys(jax.random.key(seed), rows, positions)
        return [tuple(key) for key in np.asarray(jax.random.key_data(made)).tolist()]

    rows, positions = np.repeat(np.arange(5), 6), np.tile(np.arange(6), 5)
    whole = keys(3, rows, positions)
    assert len(set(whole)) == 30
    some = [17, 2, 29]
    assert keys(3, rows[some], positions[some]) == [whole[i] for i in some]
    assert not set(keys(4, rows, positions)) & set(whole)


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits = jnp.asarray([[0.0, 2.0, 1.0, 2.0], [-jnp.inf, -1.0, -1.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert draw(logits, Sampling(), keys).tolist() == [1, 1]
