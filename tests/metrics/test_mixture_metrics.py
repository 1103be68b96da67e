"""Scores of Gaussian mixtures against scipy, scoringrules, properscoring and torchmetrics, also at the extremes."""

import math

import numpy as np
import properscoring
import pytest
import scoringrules
import torch
from scipy import integrate, optimize, stats
from torchmetrics import MeanSquaredError

from lightning_lpsgld.metrics import (
    AleatoricVariance,
    EpistemicVariance,
    IntervalCoverage,
    IntervalWidth,
    MixtureCRPS,
    MixtureNLL,
    MixtureRMSE,
    QuantileCalibration,
    gaussian_spread,
    mixture_cdf,
    mixture_crps,
    mixture_log_density,
    mixture_points,
    mixture_quantile,
)

METRICS = [
    MixtureNLL,
    MixtureCRPS,
    MixtureRMSE,
    EpistemicVariance,
    AleatoricVariance,
    IntervalCoverage,
    IntervalWidth,
    QuantileCalibration,
]


def mixtures(samples, points, spread=1.0, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = spread * torch.randn(samples, points, generator=generator, dtype=torch.float64)
    variance = noise * torch.rand(samples, points, generator=generator, dtype=torch.float64) + 0.05 * noise
    return mean, variance, 2.0 * torch.randn(points, generator=generator, dtype=torch.float64)


#: Random ones, far apart modes, nearly point masses, one sample, targets far in the tails.
CASES = {
    "random": mixtures(5, 40),
    "modes": mixtures(4, 30, spread=50.0, noise=1e-2),
    "sharp": mixtures(6, 30, noise=1e-8),
    "wide": mixtures(3, 30, noise=1e6),
    "single": mixtures(1, 30),
    "tails": (*mixtures(5, 20)[:2], torch.linspace(-300.0, 300.0, 20, dtype=torch.float64)),
}


def by_scipy(case):
    mean, variance, targets = (part.numpy() for part in CASES[case])
    return mean, np.sqrt(variance), targets


@pytest.mark.parametrize("case", CASES)
def test_density_and_distribution_are_scipys(case):
    mean, std, targets = by_scipy(case)
    log_density = np.logaddexp.reduce(stats.norm.logpdf(targets, mean, std), axis=0) - math.log(len(mean))
    np.testing.assert_allclose(mixture_log_density(*CASES[case]).numpy(), log_density, rtol=1e-9, atol=1e-9)
    cdf = stats.norm.cdf(targets, mean, std).mean(0)
    np.testing.assert_allclose(mixture_cdf(*CASES[case]).numpy(), cdf, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_crps_is_that_of_scoringrules(case):
    mean, std, targets = by_scipy(case)
    theirs = scoringrules.crps_mixnorm(targets, np.moveaxis(mean, 0, -1), np.moveaxis(std, 0, -1), backend="numpy")
    np.testing.assert_allclose(mixture_crps(*CASES[case]).numpy(), theirs, rtol=1e-6, atol=1e-7)


def test_crps_is_the_integral_of_its_definition():
    mean, std, targets = by_scipy("random")
    for point in range(4):

        def squared(x, point=point):
            return (stats.norm.cdf(x, mean[:, point], std[:, point]).mean() - (x >= targets[point])) ** 2

        whole = sum(
            integrate.quad(squared, a, b, epsabs=1e-10)[0] for a, b in ((-30, targets[point]), (targets[point], 30))
        )
        assert mixture_crps(*CASES["random"])[point].item() == pytest.approx(whole, abs=1e-6)


def test_crps_of_point_masses_is_properscorings():
    """Variance 0: the score of an empirical distribution."""
    mean, _, targets = CASES["random"]
    theirs = properscoring.crps_ensemble(targets.numpy(), mean.numpy().T)
    np.testing.assert_allclose(mixture_crps(mean, torch.zeros_like(mean), targets).numpy(), theirs, atol=1e-12)
    gaussian = properscoring.crps_gaussian(targets.numpy(), mean[0].numpy(), 0.7)
    ours = mixture_crps(mean[:1], torch.full_like(mean[:1], 0.49), targets)
    np.testing.assert_allclose(ours.numpy(), gaussian, atol=1e-12)


@pytest.mark.parametrize("case", ["random", "modes", "sharp", "wide", "single"])
@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.975])
def test_quantiles_invert_the_distribution(case, probability):
    mean, std, _ = by_scipy(case)
    ours = mixture_quantile(probability, *CASES[case][:2]).numpy()
    for point in range(mean.shape[1]):
        ends = stats.norm.ppf(probability, mean[:, point], std[:, point])
        low, high = ends.min() - 1e-9, ends.max() + 1e-9
        root = optimize.brentq(
            lambda x, point=point: stats.norm.cdf(x, mean[:, point], std[:, point]).mean() - probability, low, high,
            xtol=1e-13, rtol=1e-14,
        )  # fmt: skip
        # between modes the distribution is flat: there the probability is what can agree, not the place
        same = abs(ours[point] - root) <= 1e-6 * max(1.0, std[:, point].max())
        assert same or abs(stats.norm.cdf(ours[point], mean[:, point], std[:, point]).mean() - probability) <= 1e-12


def test_spread_of_a_point_mass_is_its_distance():
    assert torch.equal(gaussian_spread(torch.tensor([-2.0, 0.0]), torch.zeros(2)), torch.tensor([2.0, 0.0]).double())
    assert gaussian_spread(torch.tensor(0.0), torch.tensor(1.0)).item() == pytest.approx(math.sqrt(2 / math.pi))


def test_every_metric_is_its_definition():
    mean, variance, targets = CASES["random"]
    points = mixture_points(mean, variance, targets)
    inside = {level: ((points.pit >= (1 - level) / 2) & (points.pit <= (1 + level) / 2)) for level in (0.5, 0.9)}
    expected = {
        MixtureNLL(): -points.log_density.mean(),
        MixtureCRPS(): points.crps.mean(),
        EpistemicVariance(): torch.tensor(mean.numpy().var(0).mean()),
        AleatoricVariance(): variance.mean(),
        IntervalCoverage(0.5): inside[0.5].double().mean(),
        IntervalCoverage(0.9): inside[0.9].double().mean(),
        IntervalWidth(0.9): (points.quantile(0.95) - points.quantile(0.05)).mean(),
    }
    squared = MeanSquaredError(squared=False)
    squared.update(mean.mean(0), targets)
    expected[MixtureRMSE()] = squared.compute()
    for metric, value in expected.items():
        metric.update(mean, variance, targets)
        assert metric.compute().item() == pytest.approx(value.item(), rel=1e-6), type(metric).__name__


def test_calibration_of_quantiles():
    """Perfect at the levels themselves, one half where every target lies below every quantile."""
    metric = QuantileCalibration(levels=9)
    levels = torch.arange(0.05, 1.0, 0.1, dtype=torch.float64)  # ten PIT values, one in each tenth
    metric.update(torch.zeros(1, 10), torch.ones(1, 10), torch.special.ndtri(levels))
    assert metric.compute().item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(metric.observed(), metric.promised)
    metric.reset()
    metric.update(torch.zeros(1, 10), torch.ones(1, 10), torch.full((10,), -50.0))
    assert metric.compute().item() == pytest.approx(0.5)


@pytest.mark.parametrize("build", METRICS)
def test_batches_and_ranks_add_up(build):
    mean, variance, targets = CASES["random"]
    whole, ranks = build(), [build(), build()]
    whole.update(mean, variance, targets)
    for rank, start, end in ((0, 0, 7), (0, 7, 7), (1, 7, 30), (0, 30, 40)):
        ranks[rank].update(mean[:, start:end], variance[:, start:end], targets[start:end])
    for name, reduction in whole._reductions.items():
        stacked = torch.stack([getattr(rank, name) for rank in ranks])
        assert stacked.dtype == torch.float64
        torch.testing.assert_close(reduction(stacked), getattr(whole, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", METRICS)
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_nothing_has_no_score(build):
    metric = build()
    metric.update(torch.zeros(3, 0), torch.ones(3, 0), torch.zeros(0))
    assert math.isnan(metric.compute().item())


def test_extra_dims_are_points():
    mean, variance, targets = CASES["random"]
    flat, dense = MixtureCRPS(), MixtureCRPS()
    flat.update(mean, variance, targets)
    dense.update(mean.view(5, 4, 10), variance.view(5, 4, 10), targets.view(4, 10))
    assert dense.compute().item() == pytest.approx(flat.compute().item(), rel=1e-14)


@pytest.mark.parametrize("build", METRICS)
def test_metrics_plot(build):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    metric = build()
    metric.update(*CASES["random"])
    figure, axes = metric.plot()
    assert axes is not None
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixture_crps(torch.zeros(3), torch.ones(3), torch.zeros(3)), r"shape \(samples, \*\).*got \(3,\)"),
        (lambda: mixture_quantile(1.0, torch.zeros(1, 1), torch.ones(1, 1)), r"in \(0, 1\), got 1.0"),
        (lambda: IntervalCoverage(90), r"`level` must lie in \(0, 1\), got 90"),
        (lambda: IntervalWidth(0.0), r"`level` must lie in \(0, 1\), got 0.0"),
        (lambda: QuantileCalibration(0), "`levels` must be an int >= 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
