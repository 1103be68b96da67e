"""Invariant: the budget is the variance of the exact one-step law, and its shares are those of the regimes."""

from __future__ import annotations

import pytest
import torch
from helpers.stats import assert_moments, assert_same_mean, draws_for_moments

from lightning_lpsgld.analysis import naive_law, rounding_variance_after_noise, variance_budget, vc_law
from lightning_lpsgld.analysis.onestep import finite_grid
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize, quantize_variance_corrected
from lightning_lpsgld.ops.reference import variance_plan
from lightning_lpsgld.random import DrawKey, normals

VARIANCES = (0.0, 1e-7, 1e-5, 1e-4, 2e-4, 1e-3, 0.0039, 0.01, 0.3)
MEAN = torch.linspace(-1.0, 1.0, 333, dtype=torch.float64)


def variance_of(law):
    _, grid = finite_grid("fixed8.3")
    return (law @ grid**2 - (law @ grid) ** 2).mean()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("update", "law"), [("vc", vc_law), ("naive", naive_law)])
def test_budget_is_the_variance_of_the_exact_law(update, law, variance):
    budget = variance_budget(MEAN, variance, "fixed8.3", update=update)
    assert abs(float(budget.achieved) - float(variance_of(law(MEAN, variance, "fixed8.3")))) < 1e-10
    assert float(budget.target) == pytest.approx(variance, rel=1e-12)
    assert float(budget.high + budget.low + budget.unreachable) == pytest.approx(1.0, rel=1e-12)
    assert float(budget.high) == float(variance > 0.125**2 / 4)


def test_both_forms_of_the_rounding_variance_meet():
    """Folded normal and Fourier series agree where one takes over from the other, at a tenth of a gap."""
    scaled = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)
    below = rounding_variance_after_noise(scaled, torch.tensor(0.1**2 * (1 - 1e-9)).double())
    above = rounding_variance_after_noise(scaled, torch.tensor(0.1**2 * (1 + 1e-9)).double())
    assert (below - above).abs().max() < 1e-8


def test_full_accumulator_meets_the_target():
    budget = variance_budget(MEAN, 1e-6, "fixed8.3", update="full")
    assert float(budget.ratio) == 1.0
    assert float(budget.effective_temperature(0.02)) == 0.02


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "mxint8", "e4m3"])
def test_vc_on_real_tensors_delivers_the_budget(fmt):
    """Draws of Q^vc on a matrix of normal weights, with noise in both regimes: their mean variance is the budget's.

    e4m3 is tested where its promise holds: noise below the gaps of most elements, so away from the binade edges.
    """
    detect, mean = 0.1, 0.1 * normals((8, 32), DrawKey(51)).float()
    for variance in (1e-8, 1e-5) if fmt != "e4m3" else (1e-10,):
        budget = variance_budget(mean, variance, fmt)
        plan = variance_plan(mean, variance, parse_format(fmt))
        gap = torch.exp2(plan.gap_exponents.double()).expand(mean.shape)
        exact, reach = (plan.achieved * gap**2).flatten(), (7 * variance**0.5 + 2 * gap).flatten()
        assert float(budget.achieved) == pytest.approx(float(exact.mean()), rel=1e-12)
        # All elements of one matrix are independent; judged together by their mean square over the mean variance.
        scale = exact.mean().sqrt()
        draws = draws_for_moments(1.0, reach=float(reach.max() / scale), detect=detect)
        copies = -(-draws // mean.numel())
        out = torch.stack(
            [quantize_variance_corrected(mean, variance, fmt, key=DrawKey(52, step=k)) for k in range(copies)]
        )
        centred = ((out - mean).double() / scale).flatten()
        assert_moments(centred, 0.0, 1.0, reach=float(reach.max() / scale), detect=detect)


def test_the_published_setting_is_reported_as_what_it_is():
    """fixed8.8 at T = 1e-3, N = 50,000, lr 0.5: v = 2e-8 is far below a gap, and gradients of 1e-3 put the noise
    hundreds of times above it."""
    mean = torch.round(normals((1000,), DrawKey(53)) * 0.1 * 256) / 256 - 0.5 * 1e-3 * normals((1000,), DrawKey(54))
    budget = variance_budget(mean, 2 * 0.5 * 1e-3 / 50_000, "fixed8.8")
    assert float(budget.high) == 0.0
    assert float(budget.unreachable) > 0.9
    assert float(budget.ratio) > 50


def test_zero_target_and_empty_tensors():
    assert float(variance_budget(torch.zeros(4), 0.0, "fixed8.3").ratio) == 1.0
    assert float(variance_budget(torch.full((4,), 0.1), 0.0, "fixed8.3").ratio) == float("inf")
    assert float(variance_budget(torch.zeros(0, 3), 1.0, "bfp8").high) == 0.0


def test_saturation_is_counted():
    budget = variance_budget(torch.tensor([-17.0, 0.0, 15.9, 3.0]), 1e-3, "fixed8.3")
    assert float(budget.saturated) == 0.5


def test_refusals():
    with pytest.raises(ValueError, match=r"`update` must be one of .* got 'lattice'"):
        variance_budget(MEAN, 1.0, "fixed8.3", update="lattice")
    with pytest.raises(ValueError, match="`variance` must be >= 0"):
        variance_budget(MEAN, -1.0, "fixed8.3")


@pytest.mark.parametrize("update", ["vc", "naive"])
def test_the_budget_of_a_row_counts_the_next_exponent(update):
    """Against draws: mean square over the row, 0.4 of a gap above the top code, small and large noise."""
    gap = 1 / 64
    x = torch.tensor([[127.4, 0.25, -126.7, 76.2]]) * gap
    for variance in (0.05 * gap**2, 0.6 * gap**2):
        budget = variance_budget(x, variance, "bfp8", update=update)
        many = x.repeat(20_000, 1)
        if update == "vc":
            got = quantize_variance_corrected(many, variance, "bfp8", key=DrawKey(5))
        else:
            got = quantize(many + variance**0.5 * normals(many.shape, DrawKey(6)), "bfp8", key=DrawKey(5))
        squares = (got - many).double().square().mean(1)
        rival = torch.full((20_000,), float(budget.achieved), dtype=torch.float64)
        assert_same_mean(squares / gap**2, rival / gap**2, detect=0.1)
        assert float(budget.carried) > 0.02 * gap**2
        assert 0.2 < float(budget.crossing) < 0.9
