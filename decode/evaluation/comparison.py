"""Figures of several rows on the same examples, compared.

Letters: K figures (a metric of a row), N examples, R resamples.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000
_CHUNK_DRAWS = 1 << 20  # examples drawn at once


def means(values: np.ndarray) -> np.ndarray:
    """The mean of each figure over the examples that count, [K]; NaN where none does.

    Args:
      values: [K, N], NaN where an example does not count.
    """
    return _means(np.ones((1, values.shape[1])), values)[0]


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """The means of each figure over examples drawn anew with replacement, [R, K].

    Each resample draws the same examples for every figure, so that what is computed from several
    columns has the uncertainty of a comparison on the same examples: the paired bootstrap (Efron
    and Tibshirani, An introduction to the bootstrap, 1993; Koehn, Statistical significance tests
    for machine translation evaluation, 2004).

    Args:
      values: [K, N], NaN where an example does not count.
      seed: of the draws.
    """
    count = values.shape[1]
    draw = np.random.default_rng(seed)
    found, chunk = [], max(1, _CHUNK_DRAWS // count)
    for first in range(0, RESAMPLES, chunk):
        rows = min(chunk, RESAMPLES - first)
        drawn = draw.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        found.append(_means(weights.astype(np.float64), values))
    return np.concatenate(found)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a resampled figure [R]; NaN if it is undefined throughout."""
    defined = resampled[np.isfinite(resampled)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def _means(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means [R, K] under weights [R, N]."""
    counted = np.isfinite(values)
    sums = weights @ np.where(counted, values, 0.0).T
    counts = weights @ counted.T.astype(np.float64)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
