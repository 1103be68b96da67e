"""Invariant: the one-step laws are laws, have the moments that the samplers promise, and are those of the real ops.

Exact tests compare closed forms with each other and with fine quadrature; the statistical ones draw from the ops that
the samplers run and compare all 256 outcomes (chi-square). Blind spot: float32 means move probabilities by about 1e-5,
far below what is detected.
"""

from __future__ import annotations

import pytest
import torch
from helpers.stats import assert_frequencies, draws_for_frequencies

from lightning_lpsgld.analysis import lattice_law, naive_law, transition_matrix, vc_law
from lightning_lpsgld.analysis.onestep import finite_grid, rounding_masses
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import StepSpec
from lightning_lpsgld.ops.lattice import RATES, lattice_step
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id
from lightning_lpsgld.samplers.updates import langevin_step_

FORMAT = "fixed8.3"
STEP_SIZES = (2e-2, 2e-3, 2e-4)
TEMPERATURES = (1.0, 0.1, 0.01, 0.001)
DETECT = 0.1
STATES = torch.tensor([-16.0, -0.125, 0.0, 0.125, 1.25, 15.875])
DRAWS = draws_for_frequencies(DETECT, 256, len(STATES))
CODES = torch.arange(-8.0, 8.0, dtype=torch.float64)


def counts_of(values: torch.Tensor) -> torch.Tensor:
    """Counts of all codes of FORMAT; ``values`` in rows."""
    fmt, grid = finite_grid(FORMAT)
    codes = (values.double() / fmt.gap - grid[0] / fmt.gap).long()
    return torch.stack([torch.bincount(row, minlength=len(grid)) for row in codes])


def rounding_law(mean: torch.Tensor, variance: float, codes: torch.Tensor, splines: int) -> torch.Tensor:
    _, index, mass = rounding_masses(mean[None], torch.tensor(variance), codes, splines=splines)
    return torch.zeros(len(codes), dtype=torch.float64).index_add_(0, index, mass)


def row_of(state: torch.Tensor) -> torch.Tensor:
    fmt, grid = finite_grid(FORMAT)
    return ((state.double() - grid[0]) / fmt.gap).long()


def spec(update: str, lr: float, temperature: float, gradient_format: str | None) -> StepSpec:
    fmt = parse_format(FORMAT)
    rounded = None if gradient_format is None else parse_format(gradient_format)
    return StepSpec(lr, 0.0, 2 * lr * temperature, fmt, rounded, update)


# ------------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("splines", [1, 2, 3])
@pytest.mark.parametrize("variance", [1e-4, 0.03, 0.7, 5.0])
def test_closed_form_is_the_integral_of_the_spline(splines, variance):
    """The law at inner codes is the Gaussian average of the B-spline, by a midpoint rule of known error."""
    z = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 10_000 - 10.0
    weight = torch.exp(-0.5 * z * z)
    weight /= weight.sum()
    mean = torch.tensor([-0.5, 0.2, 0.75], dtype=torch.float64)
    for s in mean:
        d = s + variance**0.5 * z[:, None] - CODES
        if splines == 1:
            kernel = (d.abs() <= 0.5).double()
        elif splines == 2:
            kernel = (1 - d.abs()).clamp(min=0)
        else:
            kernel = torch.where(d.abs() <= 0.5, 0.75 - d**2, (1.5 - d.abs()).clamp(min=0) ** 2 / 2)
        expected = (weight[:, None] * kernel).sum(0)
        law = rounding_law(s, variance, CODES, splines=splines)
        # A jump of the box is off by at most one cell of z, 1e-4 wide with density 0.4; the others are smoother.
        assert (law - expected)[1:-1].abs().max() < (4.1e-5 if splines == 1 else 1e-8)


@pytest.mark.parametrize("variance", [0.0, 1e-6, 1e-3, 0.0039, 0.004, 0.05, 2.0])
def test_laws_sum_to_one_and_have_the_promised_moments(variance):
    """naive: mean μ, variance at least v; vc: mean μ, variance max(v, p(1−p)Δ²); far from the ends of the range."""
    fmt, grid = finite_grid(FORMAT)
    mean = torch.linspace(-1, 1, 101, dtype=torch.float64)
    for law, exact in ((naive_law(mean, variance, FORMAT), False), (vc_law(mean, variance, FORMAT), True)):
        assert (law.sum(-1) - 1).abs().max() < 1e-12
        assert (law >= 0).all()
        assert (law @ grid - mean).abs().max() < 1e-12
        spread = (law * (grid - mean[:, None]) ** 2).sum(-1)
        p = mean / fmt.gap - (mean / fmt.gap).floor()
        rounding = p * (1 - p) * fmt.gap**2
        if exact:
            assert (spread - rounding.clamp(min=variance)).abs().max() < 1e-12
        else:
            assert (spread >= variance - 1e-12).all()
            assert (spread <= variance + fmt.gap**2 / 4 + 1e-12).all()


def test_saturation_collects_what_lies_beyond():
    """Both ends hold the whole tail; a mean far outside ends at the end with certainty."""
    mean = torch.tensor([-100.0, -16.05, 15.9, 1e6], dtype=torch.float64)
    for law in (naive_law(mean, 0.01, FORMAT), vc_law(mean, 0.01, FORMAT), vc_law(mean, 1e-4, FORMAT)):
        assert (law.sum(-1) - 1).abs().max() < 1e-12
        assert law[0, 0] == 1.0
        assert law[3, -1] == 1.0
        assert law[1, 0] > 0.5
        assert law[2, -1] > 0.5


def test_small_probabilities_keep_their_digits():
    """Both tails agree by symmetry to twelve digits as far as they go: no cancellation."""
    codes = torch.arange(-40.0, 41.0, dtype=torch.float64)
    for splines in (1, 2, 3):
        law = rounding_law(torch.tensor(0.0).double(), 4.0, codes, splines=splines)
        assert torch.allclose(law, law.flip(0), rtol=1e-12, atol=0)
        assert (law[24:-24] > 0).all()  # eight standard deviations


@pytest.mark.parametrize("rates", RATES)
def test_lattice_law_sums_to_one_and_stays_inside(rates):
    _, grid = finite_grid(FORMAT)
    for lr in STEP_SIZES:
        for temperature in TEMPERATURES:
            law = lattice_law(grid, -lr * grid, 2 * lr * temperature, FORMAT, rates=rates)
            assert (law.sum(-1) - 1).abs().max() < 1e-12
            assert (law >= 0).all()


def test_gradient_noise_has_the_same_law_by_closed_form_and_by_averaging():
    """Naive rounding with unrounded gradient noise: the closed form equals the average over a gradient grid so fine
    that its rounding is negligible (variance below (1/256)²/4 against 0.3²)."""
    options = {"lr": 0.5, "temperature": 0.1, "grad": lambda x: x, "gradient_std": 0.3}
    closed = transition_matrix("naive", "fixed6.3", **options)
    averaged = transition_matrix("naive", "fixed6.3", **options, gradient_format="fixed12.8")
    extra = (0.5 / 256) ** 2 / 4
    # Adding a variance of at most ``extra`` moves a probability by at most extra/2 times the largest second derivative
    # of the law in its mean, itself below 2/Δ² for a hat.
    assert (closed - averaged).abs().max() <= extra / 0.125**2


# ------------------------------------------------------------------------------------- statistical: the real ops


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("lr", STEP_SIZES)
@pytest.mark.parametrize("update", ["naive", "vc"])
def test_real_step_has_the_rows_of_the_transition_matrix(update, lr, temperature):
    """Step of samplers.updates from six states, gradient θ, all outcomes against the exact law."""
    matrix = transition_matrix(update, FORMAT, lr=lr, temperature=temperature, grad=lambda x: x)
    theta = STATES[:, None].repeat(1, DRAWS)
    langevin_step_(theta, theta.clone(), None, spec(update, lr, temperature, None), DrawKey(11))
    assert_frequencies(counts_of(theta), matrix[row_of(STATES)], detect=DETECT)


@pytest.mark.parametrize("update", ["naive", "vc"])
@pytest.mark.parametrize("lr", [0.1, 2e-3])
def test_real_step_with_rounded_noisy_gradient(update, lr):
    """The same with gradient noise of 0.1 and the gradient rounded to fixed8.3, as in the published toy."""
    matrix = transition_matrix(
        update, FORMAT, lr=lr, temperature=1.0, grad=lambda x: x, gradient_std=0.1, gradient_format=FORMAT
    )
    theta = STATES[:, None].repeat(1, DRAWS)
    noise = normals(theta.shape, DrawKey(12, stream=stream_id(Role.PROBE, 0))).float()
    langevin_step_(theta, theta + 0.1 * noise, None, spec(update, lr, 1.0, FORMAT), DrawKey(13))
    assert_frequencies(counts_of(theta), matrix[row_of(STATES)], detect=DETECT)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("lr", STEP_SIZES)
@pytest.mark.parametrize(("rates", "curvature"), [("exponential", 1.0), ("bernoulli", 1.0), ("heat-bath", 0.0)])
def test_lattice_step_has_the_rows_of_the_transition_matrix(rates, curvature, lr, temperature):
    options = {"rates": rates, "curvature": curvature}
    matrix = transition_matrix("lattice", FORMAT, lr=lr, temperature=temperature, grad=lambda x: x, **options)
    theta = STATES[:, None].repeat(1, DRAWS)
    new = lattice_step(
        theta, -lr * theta, 2 * lr * temperature, FORMAT, key=DrawKey(14), rates=rates, curvature=lr * curvature
    )
    assert_frequencies(counts_of(new), matrix[row_of(STATES)], detect=DETECT)
