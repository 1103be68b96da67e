"""The statistical assertions themselves: right laws pass at the declared rate, wrong ones fail, weak tests are refused.

The simulations use torch's own generator, not the code under test.
"""

from __future__ import annotations

import pytest
import torch
from helpers import stats
from scipy import stats as scipy_stats


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20260101)


def _failures(run, repeats):
    failed = 0
    for _ in range(repeats):
        try:
            run()
        except AssertionError:
            failed += 1
    return failed


def _rate_is_kept(failed, repeats, rate):
    """Correct code must not fail more often than declared (one-sided binomial at the suite's rate)."""
    assert scipy_stats.binom(repeats, rate).sf(failed - 1) >= stats.SUITE_FALSE_FAIL_RATE, (failed, repeats, rate)


RATE, REPEATS = 0.05, 400


def test_false_fail_rate_of_means(generator):
    draws = stats.draws_for_means(0.2, cells=3, false_fail_rate=RATE)

    def run():
        samples = torch.rand(draws, 3, generator=generator) < 0.5
        stats.assert_means_equal(samples, 0.5, width=1.0, detect=0.2, false_fail_rate=RATE)

    _rate_is_kept(_failures(run, REPEATS), REPEATS, RATE)


def test_false_fail_rate_of_moments(generator):
    draws = stats.draws_for_moments(1 / 12, reach=0.5, detect=0.3, fourth_moment=1 / 80, false_fail_rate=RATE)

    def run():
        samples = torch.rand(draws, 1, generator=generator)
        stats.assert_moments(samples, 0.5, 1 / 12, reach=0.5, detect=0.3, fourth_moment=1 / 80, false_fail_rate=RATE)

    _rate_is_kept(_failures(run, REPEATS), REPEATS, RATE)


def test_false_fail_rate_of_frequencies(generator):
    law = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.03, 0.009, 0.001, 0.0], dtype=torch.float64)
    draws = stats.draws_for_frequencies(0.25, 7, false_fail_rate=RATE)

    def run():
        counts = torch.multinomial(law, draws, replacement=True, generator=generator).bincount(minlength=len(law))
        stats.assert_frequencies(counts, law, detect=0.25, false_fail_rate=RATE)

    _rate_is_kept(_failures(run, REPEATS), REPEATS, RATE)


def test_false_fail_rate_of_distributions(generator):
    draws = stats.draws_for_distribution(0.1, false_fail_rate=RATE)

    def run():
        samples = torch.randn(draws, generator=generator)
        stats.assert_distribution(samples, scipy_stats.norm.cdf, detect=0.1, false_fail_rate=RATE)

    _rate_is_kept(_failures(run, REPEATS), REPEATS, RATE)


def test_a_biased_mean_is_seen(generator):
    draws = stats.draws_for_means(0.02, cells=5)
    chance = torch.tensor([0.5, 0.5, 0.52, 0.5, 0.5])
    samples = (torch.rand(draws, 5, generator=generator) < chance).double()
    stats.assert_means_equal(samples, chance.double(), width=1.0, detect=0.02)
    with pytest.raises(AssertionError, match="mean of cell 2"):
        stats.assert_means_equal(samples, 0.5, width=1.0, detect=0.02)


def test_width_zero_asks_for_equality():
    samples = torch.full((stats.draws_for_means(0.01), 1), 0.1)
    stats.assert_means_equal(samples, float(samples[0]), width=0.0, detect=0.01)
    with pytest.raises(AssertionError, match="mean of cell 0"):
        stats.assert_means_equal(samples, 0.1 + 1e-7, width=0.0, detect=0.01)


def test_a_spread_beyond_the_width_is_seen(generator):
    with pytest.raises(AssertionError, match="spread wider"):
        stats.assert_means_equal(torch.rand(10**5, 1, generator=generator) * 2, 1.0, width=1.0, detect=0.05)


@pytest.mark.parametrize(("scale", "shift"), [(1.03**0.5, 0.0), (0.97**0.5, 0.0), (1.0, 0.03), (1.0, -0.03)])
def test_a_wrong_moment_is_seen(generator, scale, shift):
    options = {"reach": 8.0, "detect": 0.03, "fourth_moment": 3.0}
    z = torch.randn(stats.draws_for_moments(1.0, **options), generator=generator, dtype=torch.float64)
    stats.assert_moments(z, 0.0, 1.0, **options)
    with pytest.raises(AssertionError, match="of cell 0"):
        stats.assert_moments(z * scale + shift, 0.0, 1.0, **options)


def test_variance_zero_asks_for_no_motion():
    samples = torch.zeros(4, 2)
    stats.assert_moments(samples, 0.0, 0.0, reach=1.0, detect=0.1)
    samples[3, 1] = 1e-30
    with pytest.raises(AssertionError, match=r"\[1\] moved"):
        stats.assert_moments(samples, 0.0, 0.0, reach=1.0, detect=0.1)


def test_wrong_and_impossible_frequencies_are_seen(generator):
    law = torch.tensor([0.0, 0.25, 0.25, 0.5], dtype=torch.float64)
    counts = torch.multinomial(law, 10**6, replacement=True, generator=generator).bincount(minlength=4)
    stats.assert_frequencies(counts, law, detect=0.02)
    wrong = torch.tensor([0.0, 0.2575, 0.2425, 0.5], dtype=torch.float64)
    assert float(((law - wrong) ** 2 / wrong).nan_to_num().sum().sqrt()) > 0.02
    with pytest.raises(AssertionError, match="p-value"):
        stats.assert_frequencies(counts, wrong, detect=0.02)
    counts[0] = 1
    with pytest.raises(AssertionError, match="probability 0"):
        stats.assert_frequencies(counts, law, detect=0.02)


def test_wrong_distributions_are_seen(generator):
    u = torch.rand(10**6, generator=generator, dtype=torch.float64)
    stats.assert_uniform(u, detect=0.01)
    stats.assert_normal(torch.randn(10**6, generator=generator), detect=0.01)
    with pytest.raises(AssertionError, match="distribution function"):
        stats.assert_uniform(u**1.05, detect=0.01)
    with pytest.raises(AssertionError, match="open interval"):
        stats.assert_uniform(torch.zeros(10**6), detect=0.01)
    with pytest.raises(AssertionError, match="distribution function"):
        stats.assert_normal(torch.randn(10**6, generator=generator), mean=0.03, detect=0.01)


def test_correlation_is_seen(generator):
    x, y = torch.randn(2, 10**6, generator=generator)
    stats.assert_uncorrelated(x, y, reach=8.0, detect=0.02)
    with pytest.raises(AssertionError, match="correlation"):
        stats.assert_uncorrelated(x, 0.9998 * y + 0.02 * x, reach=8.0, detect=0.02)


def test_a_wrong_proportion_is_seen():
    stats.assert_proportion(50_300, 100_000, 0.5, detect=0.02)
    with pytest.raises(AssertionError, match="52000 of 100000"):
        stats.assert_proportion(52_000, 100_000, 0.5, detect=0.02)


@pytest.mark.parametrize(
    "weak",
    [
        lambda: stats.assert_means_equal(torch.rand(100, 1), 0.5, width=1.0, detect=0.01),
        lambda: stats.assert_moments(torch.rand(100, 1), 0.5, 1 / 12, reach=0.5, detect=0.01),
        lambda: stats.assert_frequencies(torch.tensor([50, 50]), torch.tensor([0.5, 0.5]), detect=0.01),
        lambda: stats.assert_uniform(torch.rand(100), detect=0.01),
        lambda: stats.assert_uncorrelated(torch.randn(100), torch.randn(100), reach=8.0, detect=0.01),
        lambda: stats.assert_proportion(50, 100, 0.5, detect=0.01),
    ],
)
def test_too_few_draws_are_refused(weak):
    with pytest.raises(ValueError, match=r"cannot keep the declared power, \d+ are needed"):
        weak()


def test_false_fail_rate_and_power_of_same_means(generator):
    def run(shift=0.0):
        a, b = (torch.rand(600, 2, generator=generator) for _ in range(2))
        stats.assert_same_mean(a + shift, b, detect=0.3, false_fail_rate=RATE)

    _rate_is_kept(_failures(run, REPEATS), REPEATS, RATE)
    assert _failures(lambda: run(0.3), 50) == 50
    with pytest.raises(ValueError, match="cannot keep the declared power"):
        stats.assert_same_mean(torch.rand(600, 1), torch.rand(600, 1), detect=0.01)
    with pytest.raises(ValueError, match="500 are needed"):
        stats.assert_same_mean(torch.rand(100, 1), torch.rand(600, 1), detect=1.0)
