"""Intervals of an evaluation, against enumeration."""

import itertools
import math

import numpy as np
import pytest

from decode.evaluation import comparison

VALUES = np.asarray([[1.0, 0.0, 1.0, np.nan], [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])


def test_resampled_intervals_against_enumeration():
    """All 256 ways to draw four examples, each as likely as another."""
    with np.errstate(invalid="ignore"):
        whole = np.asarray(
            [
                [np.nanmean(row[list(drawn)]) if np.isfinite(row[list(drawn)]).any() else np.nan
                 for row in VALUES]
                for drawn in itertools.product(range(4), repeat=4)
            ]
        )  # fmt: skip
    drawn = comparison.resampled_means(VALUES)
    assert drawn.shape == (10_000, 3)
    assert np.isnan(drawn[:, 0]).mean() == pytest.approx(1 / 256, abs=0.003)
    np.testing.assert_allclose(np.nanmean(drawn, 0), np.nanmean(whole, 0), atol=0.01)
    for first, second in itertools.combinations(range(3), 2):
        exact, ours = (m[:, first] - m[:, second] for m in (whole, drawn))
        assert np.nanstd(ours) == pytest.approx(np.nanstd(exact), rel=0.03)
        wanted = np.percentile(exact[np.isfinite(exact)], (2.5, 97.5))
        assert comparison.interval(ours) == pytest.approx(wanted, abs=1e-9)
    np.testing.assert_allclose(comparison.means(VALUES), [2 / 3, 0.5, 0.5])


def test_pairing_takes_out_what_examples_have_in_common():
    hard = np.random.default_rng(0).random(50)
    drawn = comparison.resampled_means(np.stack([hard, hard + 0.25]))
    assert np.ptp(drawn[:, 0]) > 0.1
    low, high = comparison.interval(drawn[:, 1] - drawn[:, 0])
    assert (low, high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_figures_that_are_nowhere_defined():
    drawn = comparison.resampled_means(np.full((1, 3), np.nan))
    assert all(map(math.isnan, comparison.interval(drawn[:, 0])))
    assert math.isnan(comparison.means(np.full((1, 3), np.nan))[0])
