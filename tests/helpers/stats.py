"""Statistical assertions with two declared error rates: the only place in the tests with thresholds.

Every helper promises, without tuning: correct code fails with probability at most ``false_fail_rate`` *in total over
all cells of the call* (Bonferroni), and code that is wrong by at least ``detect`` passes with probability at most
:data:`FALSE_PASS_RATE`. Where the number of draws cannot keep the second promise, the helper raises ``ValueError`` with
the number needed instead of testing weakly; the ``draws_for_*`` functions give that number beforehand.

Means and variances rest on the inequalities of Hoeffding and Bernstein, distribution functions on that of
Dvoretzky, Kiefer, Wolfowitz and Massart: all hold for every sample size. Two rest on a limit:
:func:`assert_frequencies` (chi-square with at least :data:`MIN_EXPECTED` counts expected in each cell) and
:func:`assert_same_mean` (means of at least :data:`MIN_DRAWS` draws are normal).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

__all__ = [
    "FALSE_PASS_RATE",
    "MIN_EXPECTED",
    "SUITE_FALSE_FAIL_RATE",
    "assert_distribution",
    "assert_frequencies",
    "assert_means_equal",
    "assert_moments",
    "assert_normal",
    "assert_proportion",
    "assert_same_mean",
    "assert_uncorrelated",
    "assert_uniform",
    "draws_for_distribution",
    "draws_for_frequencies",
    "draws_for_means",
    "draws_for_moments",
]

#: Probability with which one statistical test of correct code may fail; a thousand of them: once in a thousand runs.
SUITE_FALSE_FAIL_RATE = 1e-6
#: Probability with which code that is wrong by ``detect`` may pass.
FALSE_PASS_RATE = 1e-6
#: Cells of a frequency table with fewer expected counts are pooled.
MIN_EXPECTED = 25.0
#: Means of fewer draws are not taken for normal.
MIN_DRAWS = 500
#: The power of a Bernstein test is promised for wrong laws with up to this many times the declared variance.
VARIANCE_ALLOWANCE = 2.0


def _require(draws: int, needed: int, what: str) -> None:
    if draws < needed:
        raise ValueError(f"{what}: {draws} draws cannot keep the declared power, {needed} are needed.")


def _cells(value: Tensor | float, count: int, name: str) -> Tensor:
    out = torch.as_tensor(value, dtype=torch.float64).expand(count)
    if not bool(out.isfinite().all()):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    return out


def _matrix(samples: Tensor) -> Tensor:
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.shape[0] == 0:
        raise ValueError(f"`samples` must have the shape (draws, cells), got {tuple(samples.shape)}.")
    samples = samples.double()
    assert bool(samples.isfinite().all()), f"{int((~samples.isfinite()).sum())} of the samples are not finite"
    return samples


def _fail_worst(what: str, observed: Tensor, expected: Tensor, bound: Tensor, draws: int) -> None:
    """Raise for the cell that is furthest beyond its bound, if any is."""
    excess = (observed - expected).abs() / bound.clamp(min=1e-300)
    excess = torch.where(observed == expected, torch.zeros_like(excess), excess)
    worst = int(excess.argmax())
    assert float(excess[worst]) <= 1.0, (
        f"{what} of cell {worst}: {float(observed[worst]):.9g}, expected {float(expected[worst]):.9g} "
        f"within {float(bound[worst]):.3g} ({draws} draws); {int((excess > 1).sum())} of {len(excess)} cells are off"
    )


# ------------------------------------------------------------------------------------------------ bounded means


def _hoeffding(draws: int, rate: float) -> float:
    """Deviation of a mean, in units of the width, that is exceeded on one side with probability at most ``rate``."""
    return math.sqrt(math.log(1.0 / rate) / (2.0 * draws))


def draws_for_means(detect: float, cells: int = 1, false_fail_rate: float = SUITE_FALSE_FAIL_RATE) -> int:
    """Draws per cell that :func:`assert_means_equal` needs."""
    root = math.sqrt(math.log(2.0 * cells / false_fail_rate)) + math.sqrt(math.log(1.0 / FALSE_PASS_RATE))
    return math.ceil(root**2 / (2.0 * detect**2))


def assert_means_equal(
    samples: Tensor,
    expected: Tensor | float,
    *,
    width: Tensor | float,
    detect: float,
    false_fail_rate: float = SUITE_FALSE_FAIL_RATE,
) -> None:
    """Fail if any column mean of bounded samples is incompatible with ``expected`` (Hoeffding, Bonferroni).

    Args:
        samples: shape ``(draws, cells)`` or ``(draws,)``; independent along ``draws``, each within an interval of
            length ``width``. Within a row they may depend on each other. Means are taken in float64.
        expected: exact means, shape ``(cells,)``.
        width: shape ``(cells,)``; for stochastic rounding the local gap. 0 asks for equality.
        detect: smallest bias, in units of ``width``, that must not go unnoticed.
        false_fail_rate: for all cells together.

    Raises:
        AssertionError: If samples are not finite, spread over more than ``width``, or a mean is off (worst named).
        ValueError: If there are too few draws for ``detect``.
    """
    samples = _matrix(samples)
    draws, cells = samples.shape
    expected, width = _cells(expected, cells, "expected"), _cells(width, cells, "width")
    _require(draws, draws_for_means(detect, cells, false_fail_rate), "assert_means_equal")
    spread = samples.amax(0) - samples.amin(0)
    wide = spread > width * (1 + 1e-12)
    assert not bool(wide.any()), f"cells {wide.nonzero().flatten().tolist()[:8]} spread wider than the declared width"
    bound = width * _hoeffding(draws, false_fail_rate / (2 * cells))
    # The mean of equal numbers may be off by rounding; it is exact about the first sample.
    means = samples[0] + (samples - samples[0]).mean(0)
    _fail_worst("mean", means, expected, bound, draws)


def assert_proportion(
    count: int,
    draws: int,
    probability: float,
    *,
    detect: float,
    false_fail_rate: float = SUITE_FALSE_FAIL_RATE,
) -> None:
    """Fail if ``count`` successes in ``draws`` independent trials are incompatible with ``probability`` (binomial).

    Args:
        count: Successes.
        draws: Trials.
        probability: Of a success.
        detect: smallest absolute error of the probability that must not go unnoticed.
        false_fail_rate: of the two-sided test.

    Raises:
        AssertionError: If the tail beyond ``count`` is below half the rate.
        ValueError: If there are too few draws for ``detect``.
    """
    _require(draws, draws_for_means(detect, 1, false_fail_rate), "assert_proportion")
    law = stats.binom(draws, probability)
    tail = min(float(law.cdf(count)), float(law.sf(count - 1)))
    assert tail >= false_fail_rate / 2, f"{count} of {draws}, expected {probability:.9g} of them (tail {tail:.2g})"


def assert_same_mean(
    samples: Tensor,
    rival: Tensor,
    *,
    detect: Tensor | float,
    false_fail_rate: float = SUITE_FALSE_FAIL_RATE,
) -> None:
    """Fail if the column means of two sets of samples differ (Welch's test in its normal limit, Bonferroni).

    Args:
        samples: shape ``(draws, cells)`` or ``(draws,)``; independent along ``draws``, at least :data:`MIN_DRAWS`.
        rival: as ``samples``, with the same number of cells and perhaps other draws.
        detect: smallest difference, in the units of the samples, that must not go unnoticed; shape ``(cells,)``.
        false_fail_rate: for all cells together.

    Raises:
        AssertionError: If samples are not finite, or a mean is off (worst named).
        ValueError: If the standard errors are too large for ``detect``, or draws are few.
    """
    samples, rival = _matrix(samples), _matrix(rival)
    cells = samples.shape[1]
    _require(min(len(samples), len(rival)), MIN_DRAWS, "assert_same_mean")
    error = (samples.var(0) / len(samples) + rival.var(0) / len(rival)).sqrt()
    allowed = float(stats.norm.isf(false_fail_rate / (2 * cells))) * error
    blind = allowed + float(stats.norm.isf(FALSE_PASS_RATE)) * error
    if bool((blind > _cells(detect, cells, "detect")).any()):
        worst = float(error.max())
        raise ValueError(f"assert_same_mean: standard errors up to {worst:.3g} cannot keep the declared power.")
    _fail_worst("mean", samples.mean(0), rival.mean(0), allowed, len(samples))


# ----------------------------------------------------------------------------------------- mean and variance


def _bernstein(draws: int, rate: float, variance: Tensor, reach: Tensor) -> Tensor:
    """Deviation of a mean that is exceeded on one side with probability at most ``rate``."""
    log = math.log(1.0 / rate) / draws
    linear = reach * log / 3.0
    return linear + (linear**2 + 2.0 * variance * log).sqrt()


def _draws_for_bernstein(detect: Tensor, variance: Tensor, wrong: Tensor, reach: Tensor, rate: float) -> int:
    """Draws for which the bounds under the declared variance and under that of a wrong law add up to ``detect``."""

    def enough(draws: int) -> bool:
        blind = _bernstein(draws, rate, variance, reach) + _bernstein(draws, FALSE_PASS_RATE, wrong, reach)
        return bool((blind <= detect).all())

    high = 1
    while not enough(high):
        high *= 2
        if high > 2**50:
            raise ValueError("No number of draws keeps the declared power: `detect` or a variance is zero.")
    low = high // 2
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _moment_cells(
    variance: Tensor | float, reach: Tensor | float, fourth: Tensor | float | None, cells: int
) -> tuple[Tensor, Tensor, Tensor]:
    variance, reach = _cells(variance, cells, "variance"), _cells(reach, cells, "reach")
    top = reach**2 * variance  # E X^4 <= reach^2 E X^2
    return variance, reach, top if fourth is None else torch.minimum(_cells(fourth, cells, "fourth_moment"), top)


def draws_for_moments(
    variance: Tensor | float,
    *,
    reach: Tensor | float,
    detect: float,
    fourth_moment: Tensor | float | None = None,
    false_fail_rate: float = SUITE_FALSE_FAIL_RATE,
) -> int:
    """Draws per cell that :func:`assert_moments` needs."""
    cells = max(
        torch.as_tensor(part).numel() for part in (variance, reach, 0.0 if fourth_moment is None else fourth_moment)
    )
    variance, reach, fourth = _moment_cells(variance, reach, fourth_moment, cells)
    live, rate = variance > 0, false_fail_rate / (4 * cells)
    if not bool(live.any()):
        return 1
    variance, reach, fourth = variance[live], reach[live], fourth[live]
    for_mean = _draws_for_bernstein(detect * variance.sqrt(), variance, VARIANCE_ALLOWANCE * variance, reach, rate)
    square_reach, of_square = torch.maximum(reach**2 - variance, variance), (fourth - variance**2).clamp(min=0)
    wrong = VARIANCE_ALLOWANCE * fourth
    return max(for_mean, _draws_for_bernstein(detect * variance, of_square, wrong, square_reach, rate))


def assert_moments(
    samples: Tensor,
    mean: Tensor | float,
    variance: Tensor | float,
    *,
    reach: Tensor | float,
    detect: float,
    fourth_moment: Tensor | float | None = None,
    false_fail_rate: float = SUITE_FALSE_FAIL_RATE,
) -> None:
    """Fail if any column's mean or variance is incompatible with the exact ones (Bernstein, Bonferroni).

    The variance is that about the *exact* mean. The power is promised for wrong laws within the same reach whose
    variance and fourth moment are at most twice the declared ones; beyond, the test is only stronger in practice.

    Args:
        samples: shape ``(draws, cells)`` or ``(draws,)``; independent along ``draws``.
        mean: exact means, shape ``(cells,)``.
        variance: exact variances, shape ``(cells,)``; 0 asks for samples that all equal the mean.
        reach: bound on ``|sample - mean|``, shape ``(cells,)``; samples beyond it fail.
        detect: smallest error of the mean in standard deviations, and relative error of the variance, that must
            not go unnoticed.
        fourth_moment: exact central fourth moments; without them ``reach**2 * variance`` stands for them, which asks
            for more draws.
        false_fail_rate: for all cells and both moments together.

    Raises:
        AssertionError: naming the worst cell and moment.
        ValueError: If there are too few draws for ``detect``.
    """
    samples = _matrix(samples)
    draws, cells = samples.shape
    mean = _cells(mean, cells, "mean")
    variance, reach, fourth = _moment_cells(variance, reach, fourth_moment, cells)
    options = {"reach": reach, "detect": detect, "fourth_moment": fourth, "false_fail_rate": false_fail_rate}
    _require(draws, draws_for_moments(variance, **options), "assert_moments")
    centred = samples - mean
    far = centred.abs().amax(0) > reach * (1 + 1e-12)
    assert not bool(far.any()), f"cells {far.nonzero().flatten().tolist()[:8]} have samples beyond their reach"
    moved = (variance == 0) & (centred != 0).any(0)
    assert not bool(moved.any()), f"cells {moved.nonzero().flatten().tolist()[:8]} moved, though their variance is 0"
    rate = false_fail_rate / (4 * cells)
    _fail_worst("mean", centred.mean(0), torch.zeros_like(mean), _bernstein(draws, rate, variance, reach), draws)
    square_reach = torch.maximum(reach**2 - variance, variance)
    bound = _bernstein(draws, rate, (fourth - variance**2).clamp(min=0), square_reach)
    _fail_worst("variance", centred.square().mean(0), variance, bound, draws)


# ------------------------------------------------------------------------------------------------- frequencies


def _pooled(counts: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge the cells with fewer than :data:`MIN_EXPECTED` expected counts, and as many more as their sum needs."""
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    first = int((expected < MIN_EXPECTED).sum())
    while 0 < first < len(expected) and expected[:first].sum() < MIN_EXPECTED:
        first += 1
    if first == 0:
        return counts, expected
    return np.append(counts[first:], counts[:first].sum()), np.append(expected[first:], expected[:first].sum())


def draws_for_frequencies(
    detect: float, cells: int, rows: int = 1, false_fail_rate: float = SUITE_FALSE_FAIL_RATE
) -> int:
    """Draws per row that :func:`assert_frequencies` needs for tables of ``cells`` possible outcomes."""
    if cells < 2:
        return 1
    critical = stats.chi2.isf(false_fail_rate / rows, cells - 1)
    low, high = 0.0, 16.0
    while stats.ncx2.cdf(critical, cells - 1, high) > FALSE_PASS_RATE:
        low, high = high, high * 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if stats.ncx2.cdf(critical, cells - 1, middle) > FALSE_PASS_RATE else (low, middle)
    return math.ceil(high / detect**2)


def assert_frequencies(
    counts: Tensor,
    probabilities: Tensor,
    *,
    detect: float,
    false_fail_rate: float = SUITE_FALSE_FAIL_RATE,
) -> None:
    """Fail if counts are incompatible with exact probabilities (chi-square, rare cells pooled, Bonferroni over rows).

    Args:
        counts: non-negative ints, shape ``(outcomes,)`` or ``(rows, outcomes)``; each row independent draws of one law.
        probabilities: same shape, rows sum to 1. An outcome of probability 0 must not occur at all.
        detect: smallest :math:`\\sqrt{\\sum (q-p)^2/p}` of a wrong law q that must not go unnoticed (before pooling).
        false_fail_rate: for all rows together.

    Raises:
        AssertionError: naming the worst row and its p-value.
        ValueError: If there are too few draws for ``detect``, or rows do not sum to 1.
    """
    table = np.atleast_2d(torch.as_tensor(counts).cpu().numpy())
    law = np.atleast_2d(torch.as_tensor(probabilities, dtype=torch.float64).cpu().numpy())
    if table.shape != law.shape or not np.allclose(law.sum(1), 1.0, rtol=0, atol=1e-9) or (law < 0).any():
        raise ValueError(
            f"`probabilities` must be laws of the shape of `counts`, got {law.shape} with sums {law.sum(1)}."
        )
    impossible = np.argwhere((law == 0) & (table > 0))
    assert len(impossible) == 0, f"outcomes (row, cell) {impossible[:8].tolist()} have probability 0 but occurred"
    worst, at = 1.0, 0
    for row, (seen, p) in enumerate(zip(table, law)):
        possible = p > 0
        needed = draws_for_frequencies(detect, int(possible.sum()), len(table), false_fail_rate)
        _require(int(seen.sum()), needed, f"assert_frequencies, row {row}")
        seen, expected = _pooled(seen[possible].astype(float), p[possible] * seen.sum())
        if len(seen) > 1:
            value = float(stats.chi2.sf(((seen - expected) ** 2 / expected).sum(), len(seen) - 1))
            worst, at = (value, row) if value < worst else (worst, at)
    assert worst >= false_fail_rate / len(table), (
        f"row {at}: p-value {worst:.3g} of chi-square; counts {table[at].tolist()}, "
        f"expected {[round(float(e), 1) for e in law[at] * table[at].sum()]}"
    )


# ----------------------------------------------------------------------------------------------- distributions


def draws_for_distribution(detect: float, false_fail_rate: float = SUITE_FALSE_FAIL_RATE) -> int:
    """Draws that :func:`assert_distribution` needs."""
    root = math.sqrt(math.log(2.0 / false_fail_rate)) + math.sqrt(math.log(2.0 / FALSE_PASS_RATE))
    return math.ceil(root**2 / (2.0 * detect**2))


def assert_distribution(
    samples: Tensor,
    cdf: Callable[[np.ndarray], np.ndarray],
    *,
    detect: float,
    resolution: float = 0.0,
    false_fail_rate: float = SUITE_FALSE_FAIL_RATE,
) -> None:
    """Fail if the largest distance between empirical and exact distribution function is too large (DKW-Massart).

    Args:
        samples: independent draws, any shape.
        cdf: exact distribution function.
        detect: smallest distance of a wrong distribution function that must not go unnoticed.
        resolution: largest distance between ``cdf`` and the law of the correct code, which may be discrete.
        false_fail_rate: of the test.

    Raises:
        AssertionError: with the distance found.
        ValueError: If there are too few draws for ``detect``.
    """
    ordered = torch.sort(samples.flatten().double()).values
    draws = len(ordered)
    _require(draws, draws_for_distribution(detect - resolution, false_fail_rate), "assert_distribution")
    exact = cdf(ordered.cpu().numpy())
    steps = np.arange(draws + 1) / draws
    distance = float(max((exact - steps[:-1]).max(), (steps[1:] - exact).max()))
    bound = math.sqrt(math.log(2.0 / false_fail_rate) / (2.0 * draws)) + resolution
    assert distance <= bound, f"distribution function is off by {distance:.3g}, at most {bound:.3g} ({draws} draws)"


def assert_uniform(samples: Tensor, *, detect: float, resolution: float = 2.0**-24) -> None:
    """Fail if samples are not uniform on (0, 1); by default up to the grid of 24-bit draws."""
    assert bool(((samples > 0) & (samples < 1)).all()), "a draw is not in the open interval (0, 1)"
    assert_distribution(samples, stats.uniform.cdf, detect=detect, resolution=resolution)


def assert_normal(samples: Tensor, *, detect: float, mean: float = 0.0, std: float = 1.0) -> None:
    """Fail if samples are not normal."""
    assert_distribution(samples, stats.norm(mean, std).cdf, detect=detect)


def assert_uncorrelated(
    x: Tensor, y: Tensor, *, reach: float, detect: float, false_fail_rate: float = SUITE_FALSE_FAIL_RATE
) -> None:
    """Fail if standardised variables are correlated (Bernstein on their products).

    Args:
        x: draws of mean 0 and variance 1, shape ``(draws, pairs)`` or ``(draws,)``; independent along ``draws``.
        y: same.
        reach: bound on ``|x|`` and ``|y|``.
        detect: smallest correlation that must not go unnoticed.
        false_fail_rate: for all pairs together.

    Raises:
        AssertionError: naming the worst pair.
        ValueError: If there are too few draws for ``detect``.
    """
    product = _matrix(x.double() * y.double())
    draws, pairs = product.shape
    one, limit = torch.ones(pairs, dtype=torch.float64), torch.full((pairs,), reach**2, dtype=torch.float64)
    rate = false_fail_rate / (2 * pairs)
    _require(
        draws, _draws_for_bernstein(detect * one, one, VARIANCE_ALLOWANCE * one, limit, rate), "assert_uncorrelated"
    )
    _fail_worst("correlation", product.mean(0), 0 * one, _bernstein(draws, rate, one, limit), draws)
