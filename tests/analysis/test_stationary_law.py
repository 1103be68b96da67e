"""Invariant: the stationary law is exact: it reproduces the published toy by the digit, and running chains keep it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.stats import assert_frequencies, draws_for_frequencies
from helpers.targets import GAUSSIAN_TOY, GAUSSIAN_TOY_BY_FRACTION, TOY_GRADIENT_STD
from torch.distributions import Normal

from lightning_lpsgld.analysis import (
    best_on_grid,
    gibbs_on_grid,
    moments,
    naive_law,
    rounding_variance_after_noise,
    stationary_law,
    stationary_of,
    transition_matrix,
    variance_ratio,
    vc_law,
    wasserstein2,
)
from lightning_lpsgld.analysis.sum_law import sum_grid
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import StepSpec
from lightning_lpsgld.ops.lattice import lattice_step
from lightning_lpsgld.random import DrawKey, uniforms
from lightning_lpsgld.samplers.updates import langevin_step_

FORMAT = "fixed8.3"
GAP = 0.125
STEP_SIZES = (2e-2, 2e-3, 2e-4)
TEMPERATURES = (1.0, 0.1, 0.01, 0.001)
HALF_A_DIGIT = 0.5e-4 + 1e-12


def identity(x):
    return x


def toy(update, lr, fmt=FORMAT):
    return stationary_law(
        update, fmt, lr=lr, temperature=1.0, grad=identity, gradient_std=TOY_GRADIENT_STD, gradient_format=fmt
    )


def std(law):
    return math.sqrt(moments(*law)[1])


# --------------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize("row", GAUSSIAN_TOY, ids=lambda row: f"lr={row.lr}")
def test_gaussian_toy_to_the_printed_digit(row):
    naive, vc = toy("naive", row.lr), toy("vc", row.lr)
    found = (std(naive), wasserstein2(*naive), std(vc), wasserstein2(*vc))
    for value, printed in zip(found, row[1:]):
        assert abs(value - printed) <= HALF_A_DIGIT


@pytest.mark.parametrize("row", GAUSSIAN_TOY_BY_FRACTION, ids=lambda row: f"F={row.fraction_length}")
def test_gaussian_toy_by_fraction_length_to_the_printed_digit(row):
    fmt = f"fixed{row.fraction_length + 5}.{row.fraction_length}"
    naive, vc = toy("naive", 1e-3, fmt), toy("vc", 1e-3, fmt)
    found = (std(naive), wasserstein2(*naive), std(vc), wasserstein2(*vc))
    for value, printed in zip(found, row[1:5]):
        assert abs(value - printed) <= HALF_A_DIGIT


def test_naive_variance_follows_the_small_step_formula():
    """Var -> Δ/√(πα): the deviation falls with the step size, and is below 1 % from α = 1e-4 on."""
    deviations = []
    for lr in (1e-3, 1e-4, 1e-5):
        law = stationary_law("naive", FORMAT, lr=lr, temperature=1.0, grad=identity)
        deviations.append(abs(moments(*law)[1] * math.sqrt(math.pi * lr) / GAP - 1))
    assert deviations[1] < 0.01
    assert deviations[1] < deviations[0]
    assert deviations[2] < 0.02  # here the walls at ±16 begin to be felt (std 4.7)


@pytest.mark.parametrize("fraction", [2, 3, 4, 5])
def test_vc_is_as_close_to_the_target_as_the_grid_allows(fraction):
    """W2 >= that of the rounded target for every law on the grid; VC exceeds it by less than its excess in std."""
    law = stationary_law("vc", f"fixed{fraction + 5}.{fraction}", lr=1e-3, temperature=1.0, grad=identity)
    best = best_on_grid(law[0])
    floor = wasserstein2(*best)
    assert abs(floor - 2.0**-fraction / math.sqrt(12)) < 1e-9
    assert floor <= wasserstein2(*law) <= floor + abs(std(law) - std(best))


# ------------------------------------------------------------------------------------------------ the linear system


def test_stationary_law_is_invariant():
    for update in ("naive", "vc", "lattice"):
        matrix = transition_matrix(update, FORMAT, lr=1e-3, temperature=1.0, grad=identity)
        _, law = stationary_law(update, FORMAT, lr=1e-3, temperature=1.0, grad=identity)
        if update == "lattice":
            matrix = transition_matrix(update, FORMAT, lr=1e-3, temperature=1.0, grad=identity, curvature=1.0)
        assert (law @ matrix - law).abs().max() < 1e-14


def test_elimination_solves_a_birth_death_chain_to_its_smallest_state():
    """Ratios of 1e-12 per state, 20 states: every probability down to 1e-228 to 12 digits."""
    size, ratio = 20, 1e-12
    up, down = 0.5 * ratio, 0.5
    matrix = torch.diag(torch.full((size - 1,), up).double(), 1) + torch.diag(
        torch.full((size - 1,), down).double(), -1
    )
    matrix += torch.diag(1 - matrix.sum(1))
    law = stationary_of(matrix)
    assert torch.allclose(law[1:] / law[:-1], torch.full((size - 1,), ratio).double(), rtol=1e-12, atol=0)


def test_chain_that_falls_apart_is_refused():
    with pytest.raises(ValueError, match="cannot be left"):
        stationary_of(torch.eye(3))


def test_two_modes_have_their_exact_weights():
    """A double well with modes at ±1: the lattice walk keeps exp(−U_trapezoid/T) exactly, unequal wells included."""

    def grad(x):
        return 4 * x**3 - 4 * x + 0.2

    grid, law = stationary_law("lattice", "fixed6.4", lr=1e-3, temperature=0.5, grad=grad, curvature=0.0)
    slope = grad(grid)
    potential = torch.cat([torch.zeros(1).double(), ((slope[1:] + slope[:-1]) / 2 * grid.diff()).cumsum(0)])
    _, expected = gibbs_on_grid(grid, potential, 0.5)
    assert torch.allclose(law, expected, rtol=1e-9, atol=1e-15)


# -------------------------------------------------------------------------------------------- the lattice's promise


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("lr", STEP_SIZES)
def test_lattice_has_the_best_variance_on_the_grid(lr, temperature):
    """Within 1 % of the law that its rates are made for, at every step size and temperature: exponential rates of the
    target on the grid points, exponential fitting of the target's mass per cell (the W2-best law). VC is off by more
    from both as soon as the gap is wider than the target's standard deviation."""
    options = {"lr": lr, "temperature": temperature, "grad": identity}
    points = stationary_law("lattice", FORMAT, **options)
    cells = stationary_law("lattice", FORMAT, **options, rates="bernoulli")
    vc = stationary_law("vc", FORMAT, **options)
    grid = points[0]
    on_points = moments(*gibbs_on_grid(grid, grid**2 / 2, temperature))[1]
    target = Normal(torch.tensor(0.0).double(), torch.tensor(temperature).double().sqrt())
    best = best_on_grid(grid, target)
    assert abs(moments(*points)[1] / on_points - 1) < 0.01
    assert abs(moments(*cells)[1] / moments(*best)[1] - 1) < 0.01
    assert wasserstein2(*cells, target) < 1.01 * wasserstein2(*best, target)
    if temperature**0.5 < GAP:
        assert abs(moments(*vc)[1] / on_points - 1) > 0.01
        assert abs(moments(*vc)[1] / moments(*best)[1] - 1) > 0.01


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_bias_of_saturating_rates_is_the_derived_one(temperature):
    """Heat-bath: exp(−θ²/2T) cosh(Δθ/2T) is the target moved by ±Δ/2, so its variance is T + Δ²/4."""
    law = stationary_law("lattice", FORMAT, lr=2e-4, temperature=temperature, grad=identity, rates="heat-bath")
    assert abs(variance_ratio(*law, temperature) - 1 - GAP**2 / (4 * temperature)) < 1e-9


def test_exponential_rates_do_not_see_equal_gradient_noise():
    """Gaussian noise that is the same everywhere scales both odds alike: the law stays, only the clock speeds up."""
    options = {"lr": 2e-3, "temperature": 1.0, "grad": identity, "curvature": 0.0}
    calm = stationary_law("lattice", FORMAT, **options)
    noisy = stationary_law("lattice", FORMAT, **options, gradient_std=1.0)
    assert abs(moments(*noisy)[1] / moments(*calm)[1] - 1) < 1e-6
    fitted = stationary_law("lattice", FORMAT, **options, gradient_std=1.0, rates="bernoulli")
    unfitted = stationary_law("lattice", FORMAT, **options, rates="bernoulli")
    assert moments(*fitted)[1] > moments(*unfitted)[1] * 1.0005


# ------------------------------------------------------------------------------------------- running chains keep it


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("update", ["naive", "vc", "exponential", "bernoulli"])
def test_running_chains_keep_the_law(update, temperature):
    """Independent chains started from the exact law have it after 100 steps of 2e-2 (two relaxation times).

    One chain per element, so draws are independent and the chi-square is valid whatever the autocorrelation.
    """
    lr, steps, detect = 2e-2, 100, 0.1
    walk = update not in ("naive", "vc")
    rates = {"rates": update} if walk else {}
    grid, law = stationary_law(
        "lattice" if walk else update, FORMAT, lr=lr, temperature=temperature, grad=identity, **rates
    )
    chains = draws_for_frequencies(detect, 256)
    index = torch.searchsorted(law.cumsum(0), uniforms((chains,), DrawKey(21))).clamp(max=255)
    theta = grid[index].float()
    fmt = parse_format(FORMAT)
    spec = StepSpec(lr, 0.0, 2 * lr * temperature, fmt, None, "naive" if walk else update)
    for k in range(steps):
        key = DrawKey(22, step=k)
        if walk:
            theta = lattice_step(theta, -lr * theta, spec.noise_variance, fmt, key=key, rates=update, curvature=lr)
        else:
            langevin_step_(theta, theta.clone(), None, spec, key)
    counts = torch.bincount(((theta.double() - grid[0]) / GAP).long(), minlength=256)
    assert_frequencies(counts, law, detect=detect)


# ------------------------------------------------------------------------------------- sums on a grid of their own


def float_variance(lr, temperature, gap):
    """SGLDLP-F on U = x^2/2 with weights of this gap: noise, and the view's rounding as noise of the gradient."""
    variance = temperature
    for _ in range(100):
        units = torch.tensor([variance / gap**2], dtype=torch.float64)
        seen = float(rounding_variance_after_noise(torch.zeros(1, dtype=torch.float64), units)) * gap**2
        variance = (2 * lr * temperature + lr**2 * seen) / (1 - (1 - lr) ** 2)
    return variance


@pytest.mark.parametrize("lr", STEP_SIZES)
def test_a_sum_of_16_bits_has_the_variance_of_a_float32_one(lr):
    """Weights fixed8.3, T = 1e-3: within 1 % (found: 8e-5); 1.7 times and more where the weight is the sum.

    The sum's grid is that of "bfp16" and "fixed16.11" in the middle eighth of its range, 60 standard deviations.
    """
    asked = {"lr": lr, "temperature": 1e-3, "grad": identity}
    variance = moments(*stationary_law("vc", FORMAT, accumulator="fixed13.11", **asked))[1]
    expected = float_variance(lr, 1e-3, GAP)
    assert abs(variance / expected - 1) < 2e-4
    assert abs(variance / expected - 1) < 0.01
    assert moments(*stationary_law("vc", FORMAT, **asked))[1] > 1.7 * expected


def test_blocks_of_sums_are_taken_at_the_range_of_the_weights():
    assert sum_grid("bfp16", parse_format(FORMAT)) == parse_format("fixed16.11s")
    assert sum_grid("mxint16", parse_format("fixed8.6")) == parse_format("fixed16.14s")
    assert sum_grid("fixed13.11", parse_format(FORMAT)) == parse_format("fixed13.11")


@pytest.mark.parametrize(("update", "noise"), [("naive", 0.0), ("vc", 0.0), ("vc", 0.3)])
def test_the_law_of_sums_is_invariant_under_the_dense_matrix_of_the_same_chain(update, noise):
    """A grid small enough for all pairs, written out here from the one-step laws and the law of the view."""
    lr, temperature, weights, sums = 0.05, 2e-3, "fixed6.4", "fixed10.8"
    grid, law = stationary_law(
        update, weights, lr=lr, temperature=temperature, grad=lambda x: x**3 - x, gradient_std=noise, accumulator=sums
    )
    one_step = {"naive": naive_law, "vc": vc_law}[update]
    variance = 2 * lr * temperature
    assert variance > 2.0**-16 / 4, "above it, noise of the gradient just adds to the noise of the step"
    gap, image = parse_format(weights).gap, torch.zeros_like(law)
    below = (grid / gap).floor() * gap
    for theta, share in ((below, 1 - (grid - below) / gap), (below + gap, (grid - below) / gap)):
        theta = theta.clamp(parse_format(weights).min, parse_format(weights).max)
        mean = grid - lr * (theta**3 - theta)
        if noise == 0.0 or update == "naive":
            image += (law * share) @ one_step(mean, variance + (lr * noise) ** 2, sums)
        else:
            draws = torch.arange(-24, 25, dtype=torch.float64) / 4
            density = torch.exp(-0.5 * draws**2) / torch.exp(-0.5 * draws**2).sum()
            for z, w in zip(draws, density):
                image += w * (law * share) @ vc_law(mean + lr * noise * z, variance, sums)
    assert float((image - law).abs().sum()) < (1e-10 if noise == 0.0 else 1e-4)


# ------------------------------------------------------------------------------------------------------- refusals


def test_refusals_name_argument_and_value():
    options = {"lr": 0.1, "temperature": 1.0, "grad": identity}
    with pytest.raises(ValueError, match=r"`update` must be one of .* got 'full'"):
        stationary_law("full", FORMAT, **options)
    with pytest.raises(TypeError, match=r"at most 8 bits and 4 bits of exponent.* got bfp8"):
        stationary_law("vc", "bfp8", **options)
    with pytest.raises(ValueError, match="`temperature` must be finite and >= 0, got -1"):
        stationary_law("vc", FORMAT, lr=0.1, temperature=-1.0, grad=identity)
    for accumulator in ("e4m3", "fixed18.13"):
        with pytest.raises(TypeError, match=f"at most 16 bits, .*; got {accumulator}"):
            stationary_law("vc", FORMAT, accumulator=accumulator, **options)
    with pytest.raises(ValueError, match="takes accumulator='low' only"):
        stationary_law("lattice", FORMAT, accumulator="fixed12.7", **options)
    with pytest.raises(ValueError, match="Take a coarser `accumulator`"):
        stationary_law("vc", FORMAT, accumulator="fixed16.11", lr=0.5, temperature=1.0, grad=identity)
