"""Invariant: the lattice walk stays on the grid, balances in detail, and has the mean and the limits that it states."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.stats import assert_means_equal, assert_moments, draws_for_means, draws_for_moments

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.lattice import RATES, jump_odds, lattice_step, walk_law, walk_plan
from lightning_lpsgld.random import DrawKey, normals

FORMAT = parse_format("fixed8.3")
GAP = FORMAT.gap
CODES = torch.arange(-128, 128, dtype=torch.float64)
THETA = CODES * GAP


def law_matrix(grad, lr, temperature, **options):
    codes, masses, plan = walk_law(THETA, -lr * grad, 2 * lr * temperature, FORMAT, **options)
    matrix = torch.zeros(256, 256, dtype=torch.float64)
    matrix.scatter_add_(1, (codes + 128).long(), masses)
    return matrix, plan


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("lr", [2e-2, 2e-3, 2e-4])
def test_exponential_rates_balance_in_detail(lr, temperature):
    """π_k P_kj = π_j P_jk for π = exp(−θ²/2T), between all states whose odds are not capped, at every step size."""
    matrix, plan = law_matrix(THETA, lr, temperature, curvature=lr)
    free = ~(plan.capped | plan.ballistic)
    assert free[THETA.abs() <= 5 * temperature**0.5].all()
    log = -(THETA**2) / (2 * temperature)
    flow = matrix * torch.exp(log[:, None] - torch.maximum(log[:, None], log[None, :]))
    back = matrix.T * torch.exp(log[None, :] - torch.maximum(log[:, None], log[None, :]))
    both = free[:, None] & free[None, :]
    both.fill_diagonal_(False)
    assert (flow - back)[both].abs().max() <= 1e-12 * flow[both].max()


@pytest.mark.parametrize("curvature", [0.5, 1.0])
def test_bernoulli_rates_balance_the_mass_of_cells(curvature):
    """Told the curvature h, π_k is the integral of exp(−hθ²/2T) over the k-th cell, on a quadratic, exactly."""
    lr, temperature = 1e-3, 0.01
    matrix, _ = law_matrix(curvature * THETA, lr, temperature, rates="bernoulli", curvature=lr * curvature)
    scale = math.sqrt(curvature / (2 * temperature))
    low, high = (CODES.abs() - 0.5) * GAP * scale, (CODES.abs() + 0.5) * GAP * scale
    cell = torch.special.erfc(low) - torch.special.erfc(high)
    near = slice(128 - 6, 128 + 7)  # out to seven standard deviations
    ratio = matrix.diagonal(1)[near] / matrix.diagonal(-1)[near]
    assert torch.allclose(ratio, (cell[1:] / cell[:-1])[near], rtol=1e-9, atol=0)


@pytest.mark.parametrize("rates", ["bernoulli", "linear"])
def test_mean_step_of_the_linear_rates_is_the_drift(rates):
    """Exactly m, for v up to Δ²/2 and any drift that jumps can carry."""
    drift = torch.linspace(-0.05, 0.05, 256, dtype=torch.float64)
    for variance in (0.0, 1e-9, 1e-5, 1e-3, GAP**2 / 2):
        codes, masses, plan = walk_law(torch.zeros_like(drift), drift, variance, FORMAT, rates=rates)
        assert (plan.reach == 1).all()
        mean = (codes * masses).sum(-1) * GAP
        assert torch.allclose(mean[~plan.ballistic], drift[~plan.ballistic], rtol=1e-12, atol=1e-17)
        assert (~plan.ballistic).sum() > 150


def test_second_moment_of_the_linear_rates_is_that_of_the_variance_corrected_quantizer():
    """max(v, Δ|m|): where Q^vc can reach v + m² it has that; where it cannot, both have Δ|m|."""
    drift, variance = torch.tensor([1e-4, 0.01, 0.03]).double(), 1e-4
    codes, masses, _ = walk_law(torch.zeros(3).double(), drift, variance, FORMAT, rates="linear")
    second = (codes**2 * masses).sum(-1) * GAP**2
    assert torch.allclose(second, (GAP * drift).clamp(min=variance), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rates", RATES)
def test_flat_target_gets_exactly_the_variance(rates):
    """Without drift: mean 0 and variance v, from a thousandth of a gap to several gaps per step."""
    for target in (1e-6, 0.1, 0.5, 0.51, 3.0, 40.0):
        codes, masses, plan = walk_law(
            torch.zeros(1).double(), torch.zeros(1).double(), target * GAP**2, FORMAT, rates=rates
        )
        assert float(plan.clock.max()) <= 0.5
        assert abs(float((codes * masses).sum())) < 1e-15
        assert abs(float((codes**2 * masses).sum()) / target - 1) < 1e-12


@pytest.mark.parametrize("rates", ["bernoulli", "linear"])
def test_without_noise_it_is_stochastic_rounding(rates):
    """v = 0, or so small that the slope overflows any exponential: mean exact, at most one gap away."""
    theta, drift, detect = torch.zeros(4), torch.tensor([0.0, 0.03, -0.1, 0.3]), 0.02
    draws = draws_for_means(detect, 4)
    for variance in (0.0, 1e-30):
        new = lattice_step(
            theta.expand(draws, 4).contiguous(), drift.expand(draws, 4).contiguous(), variance, FORMAT,
            key=DrawKey(31), rates=rates,
        )  # fmt: skip
        assert_means_equal(new, drift.double(), width=GAP, detect=detect)


def test_odds_are_probabilities_where_exponentials_overflow():
    slope = torch.tensor([-1e30, -1e3, 0.0, 1e3, 1e30]).double()
    for rates in RATES:
        plan = walk_plan(torch.zeros(5).double(), slope * 1e-6, 1e-9, FORMAT, rates=rates, curvature=1.0)
        up, down = jump_odds(plan, torch.ones(5).double())
        assert up.isfinite().all()
        assert down.isfinite().all()
        assert (up + down <= 1 + 1e-15).all()
        assert (up[3:] > down[3:]).all()


def test_odds_are_probabilities_whatever_the_noise():
    """Slopes and noises of any size: no NaN, no sum above 1; noise much larger than the slope stops the walk."""
    sizes = torch.tensor([0.0, 1e-9, 1.0, 1e3, 1e80, 1e200, 1e300]).double()
    slope, noise = sizes.repeat(7), sizes.repeat_interleave(7)
    for target in (1e-6, 3.0):
        variance = target * GAP**2
        plan = walk_plan(
            torch.zeros(49).double(), slope * variance, variance, FORMAT, gradient_std=noise * variance / GAP
        )
        for length in range(1, int(plan.reach.max()) + 1):
            up, down = jump_odds(plan, torch.full((49,), float(length)).double())
            assert up.isfinite().all()
            assert down.isfinite().all()
            assert (up + down <= 1 + 1e-15).all()
            assert (up + down)[(slope <= 1.0) & (noise >= 1e3)].max() == 0.0


def test_told_no_noise_it_is_the_same_step():
    theta = quantize(normals((512,), DrawKey(40)).float(), FORMAT, rounding="nearest")
    plain = lattice_step(theta, -0.01 * theta, 1e-2, FORMAT, key=DrawKey(41))
    told = lattice_step(theta, -0.01 * theta, 1e-2, FORMAT, key=DrawKey(41), gradient_std=torch.zeros(512))
    assert torch.equal(plain, told)


@pytest.mark.parametrize("fmt", ["fixed8.3", "bfp8"])
def test_no_value_is_read_by_the_host_on_an_accelerator(fmt):
    """A tensor without values, as on "meta", cannot be read: a step that does not try is one that does not wait."""
    theta = torch.zeros(4, 8, device="meta")
    new = lattice_step(theta, theta, torch.ones((), device="meta"), fmt, key=DrawKey(0), gradient_std=theta)
    assert new.shape == theta.shape


def test_drift_beyond_the_reach_is_taken_in_one_step():
    """A mean step of ten gaps: Q^vc takes it, mean and variance as it promises."""
    drift, variance = 10.3 * GAP, 1e-4
    reach, rounding = 2 * GAP, 0.3 * 0.7 * GAP**2
    draws = draws_for_moments(rounding, reach=reach, detect=0.1)
    for rates in RATES[:3]:
        new = lattice_step(
            torch.zeros(draws), torch.full((draws,), drift), variance, FORMAT, key=DrawKey(32), rates=rates
        )
        assert_moments(new - drift, 0.0, rounding, reach=reach, detect=0.1)


def test_jumps_over_the_end_are_not_made():
    for end, inner in ((15.875, 15.75), (-16.0, -15.875)):
        new = lattice_step(torch.full((10_000,), end), torch.zeros(10_000), GAP**2 / 2, FORMAT, key=DrawKey(33))
        assert set(new.tolist()) == {end, inner}


def test_off_grid_weights_are_rounded_first_and_inputs_are_kept():
    theta, drift = torch.full((1000,), 0.3), torch.zeros(1000)
    new = lattice_step(theta, drift, 1e-12, FORMAT, key=DrawKey(34))
    assert set(new.tolist()) <= {0.25, 0.375}
    assert (theta == 0.3).all()


def test_same_key_same_step_and_dtype_is_kept():
    theta = quantize(normals((64,), DrawKey(35)).float(), FORMAT, rounding="nearest")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        first, second = (
            lattice_step(theta.to(dtype), theta.to(dtype) * -0.1, 1e-2, FORMAT, key=DrawKey(36)) for _ in range(2)
        )
        assert torch.equal(first, second)
        assert first.dtype == dtype


# -------------------------------------------------------------------------------------------------- block formats


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "mxint8", "bfp4"])
@pytest.mark.parametrize("rates", RATES)
def test_block_formats_stay_on_their_grid(fmt, rates):
    """After 30 steps of a walk whose exponents change, values are on the grid: rounding to nearest changes nothing."""
    theta = quantize(normals((16, 64), DrawKey(37)).float(), fmt, rounding="nearest")
    for k in range(30):
        theta = lattice_step(theta, -0.05 * theta, 1e-2, fmt, key=DrawKey(38, step=k), rates=rates)
        assert torch.equal(theta, quantize(theta, fmt, rounding="nearest"))
    assert theta.isfinite().all()


def test_block_whose_exponent_rises_keeps_every_mean():
    """The largest element, at code 127, jumps to 128 and doubles the gap: odd codes are rounded without bias.

    Without noise and drift but for the largest, so the mean of the others must be their value.
    """
    row = torch.tensor([127.0, 3.0, -5.0, 64.0]) / 64
    detect = 0.02
    draws = draws_for_means(detect, 4)
    drift = torch.tensor([0.5 / 64, 0.0, 0.0, 0.0]).expand(draws, 4).contiguous()
    new = lattice_step(row.expand(draws, 4).contiguous(), drift, 0.0, "bfp8", key=DrawKey(39), rates="bernoulli")
    assert_means_equal(new, row.double() + drift[0].double(), width=2 / 64, detect=detect)


# ------------------------------------------------------------------------------------------------------- refusals


def test_refusals_name_rule_and_value():
    theta = torch.zeros(3)
    with pytest.raises(ValueError, match="equal gaps up and down"):
        lattice_step(theta, theta, 1.0, "e4m3", key=DrawKey(0))
    with pytest.raises(ValueError, match=r"`rates` must be one of .* got 'metropolis'"):
        lattice_step(theta, theta, 1.0, FORMAT, key=DrawKey(0), rates="metropolis")
    with pytest.raises(ValueError, match="`variance` must be >= 0"):
        lattice_step(theta, theta, -1.0, FORMAT, key=DrawKey(0))
    with pytest.raises(ValueError, match="`gradient_std` must be >= 0"):
        lattice_step(theta, theta, 1.0, FORMAT, key=DrawKey(0), gradient_std=torch.tensor(-1.0))
    with pytest.raises(ValueError, match=r"`gradient_std` is for rates='exponential'.*rates='bernoulli'"):
        lattice_step(theta, theta, 1.0, FORMAT, key=DrawKey(0), rates="bernoulli", gradient_std=0.1)
    with pytest.raises(ValueError, match=r"shape of `theta`, \(3,\), got \(2,\)"):
        lattice_step(theta, torch.zeros(2), 1.0, FORMAT, key=DrawKey(0))
    with pytest.raises(ValueError, match="wider than"):
        lattice_step(theta.half(), theta.half(), 1.0, "fixed16.3", key=DrawKey(0))
