"""Figures with their uncertainty, pass@k, and the share of a gap that is closed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959963984540054  # 97.5 % of the normal distribution lies below


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and how far to trust it.

    Attributes:
      value: the mean.
      standard_error: sample standard deviation / sqrt(count); None for a single value.
      low, high: 95 % confidence interval; None where a single value gives none.
      count: values.
    """

    value: float
    standard_error: float | None
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float], *, share: bool = True) -> Estimate:
    """The mean of per-example values.

    Of shares the interval is Wilson's. For values between 0 and 1 that are neither (pass@k, a drawn
    comparison) it errs on the wide side, since none vary more than zeros and ones of their mean.
    Otherwise it is the normal approximation.

    Args:
      values: [n], n at least 1.
      share: they are between 0 and 1.
    """
    array = np.asarray(values, np.float64)
    n, mean = len(array), float(array.mean())
    error = float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    low = high = None
    if share:
        low, high = wilson(mean, n)
    elif error is not None:
        low, high = mean - _Z * error, mean + _Z * error
    return Estimate(mean, error, low, high, n)


def wilson(share: float, trials: float) -> tuple[float, float]:
    """The 95 % score interval of a share, from `trials` that need not be a whole number.

    It stays inside [0, 1] and has a width even where the share is 0 or 1 (E. B. Wilson, Probable
    inference, the law of succession, and statistical inference, JASA 1927).
    """
    centre = (share + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    spread = share * (1 - share) / trials + _Z**2 / (4 * trials**2)
    half = _Z / (1 + _Z**2 / trials) * math.sqrt(spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes.

    1 - C(samples - passed, k) / C(samples, k), as a product (Chen et al., Evaluating large
    language models trained on code, 2021, section 2.1).

    Args:
      samples: at least k.
      passed: of those.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} of {passed} passed among {samples} samples is undefined")
    if samples - passed < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - passed + 1, samples + 1)))


def gap_closed(base: float, proxy: float, tuned: float) -> float:
    """Share of the way from the base model to the tuned one that proxy-tuning goes.

    (proxy - base) / (tuned - base), Liu et al. 2024; the same for metrics to be lowered. NaN where
    tuning changes nothing.
    """
    return (proxy - base) / (tuned - base) if tuned != base else math.nan
