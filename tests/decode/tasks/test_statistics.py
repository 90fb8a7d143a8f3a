"""Estimates against scipy and stored figures, pass@k by counting, the paper's headline."""

import itertools
import math

import pytest
from scipy import stats

from decode.tasks.statistics import estimate, gap_closed, pass_at_k
from tests import stored


@pytest.mark.parametrize(("passed", "n"), [(0, 2800), (7, 9), (431, 1319), (5, 5), (0, 1)])
def test_interval_of_a_share(passed, n):
    expected = stats.binomtest(passed, n).proportion_ci(0.95, method="wilson")
    found = estimate([1.0] * passed + [0.0] * (n - passed))
    assert found.value == passed / n
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.count == n


def test_interval_of_a_length():
    values = [3.0, 8.0, 1000.0, 12.5]
    found = estimate(values, share=False)
    error = stats.sem(values)
    assert found.standard_error == pytest.approx(error)
    expected = stats.norm.interval(0.95, sum(values) / 4, error)
    assert (found.low, found.high) == pytest.approx(expected)
    alone = estimate([3.0], share=False)
    assert (alone.value, alone.standard_error, alone.low, alone.high) == (3.0, None, None, None)


def test_standard_errors_of_the_stored_comparisons():
    seen = 0
    for name, row in stored.metrics("all").items():
        if name.startswith("alpaca_farm/"):
            wins = [1.0] * row["n_wins"] + [0.0] * row["n_wins_base"] + [0.5] * row["n_draws"]
            found = estimate(wins)
            assert 100 * found.value == pytest.approx(row["win_rate"], abs=1e-10)
            assert found.standard_error is not None
            assert 100 * found.standard_error == pytest.approx(row["standard_error"], abs=1e-10)
            seen += 1
    assert seen == 7


@pytest.mark.parametrize(
    ("n", "passed", "k"), [(5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 5, 3), (4, 1, 1)]
)
def test_pass_at_k_counts_draws_without_a_pass(n, passed, k):
    draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
    assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_stable_for_many_samples():
    n, passed, k = 20_000, 3, 100
    exact = 1 - math.comb(n - passed, k) / math.comb(n, k)
    assert pass_at_k(n, passed, k) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("n", "passed", "k"), [(5, 2, 6), (5, 6, 1), (5, 1, 0)])
def test_pass_at_k_that_is_undefined(n, passed, k):
    with pytest.raises(ValueError, match="undefined"):
        pass_at_k(n, passed, k)


@pytest.mark.parametrize(("size", "headline"), [("13B", 91.05), ("70B", 88.07)])
def test_headline_of_the_paper(size, headline):
    """Mean gap closed over five experiments, from the stored figures of the published code."""
    rows = stored.metrics("all")
    settings = [
        ("alpaca_farm/{}/metrics.json", "win_rate", ""),
        ("gsm/{}/metrics.json", "exact_match", ""),
        ("toxigen/{}/metrics.json", "overall", ""),
        ("truthfulqa/{}/mc_metrics.json", "acc", "-helpful-prompt"),
        ("truthfulqa/{}/open_metrics.json", "GPT-true-info acc", "-helpful-prompt"),
    ]
    gaps = []
    for path, metric, prompted in settings:
        models = f"llama2-{size}", f"dexperts-{size}{prompted}", f"llama2-chat-{size}{prompted}"
        gaps.append(gap_closed(*(rows[path.format(model)][metric] for model in models)))
    assert round(100 * sum(gaps) / len(gaps), 2) == headline


def test_gap_where_tuning_changes_nothing():
    assert math.isnan(gap_closed(0.5, 0.6, 0.5))
    assert gap_closed(0.7, 0.1, 0.0) == pytest.approx(6 / 7)
