"""Invariant: the one-step laws of SGHMC are laws, have the moments of the exact integrator, and are those of the op.

Exact tests compare them with the laws of one coordinate and with the same integral taken in the other order; the
statistical ones draw from the optimizer and compare all outcomes (x', v') (chi-square). Blind spots: float32 means move
probabilities by about 1e-5, far below what is detected; and at steps of 0.02 and 0.0002 rounding hides from the naive
law what sign the position's drift has, at 0.0002 also its covariance. The published toy's step shows both.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.stats import SUITE_FALSE_FAIL_RATE, assert_frequencies, draws_for_frequencies

from lightning_lpsgld.analysis import naive_law, underdamped_law, vc_law
from lightning_lpsgld.analysis.underdamped import PhaseGrid, pair_masses, step_flow
from lightning_lpsgld.samplers import SGHMC

POSITION, VELOCITY = "fixed8.3", "fixed8.4"
TOY = {"friction": 3.0, "inverse_mass": 2.0}
STEP_SIZES = (2e-2, 2e-3, 2e-4)
TEMPERATURES = (1.0, 0.1, 0.01, 0.001)
DETECT = 0.1
#: Positions and velocities: the middle, near it, moving in and out, and a corner of both grids.
X = torch.tensor([0.0, -0.125, 1.25, 0.375, -2.0, 15.875], dtype=torch.float64)
V = torch.tensor([0.0, -0.0625, 0.5, 2.0, 1.5, 7.9375], dtype=torch.float64)
INSIDE = slice(0, 5)
SPACE = PhaseGrid.of(POSITION, VELOCITY)
#: All chi-square tests of this file together fail correct code with the probability that one test may.
RATE = SUITE_FALSE_FAIL_RATE / (2 * len(STEP_SIZES) * len(TEMPERATURES) + 4)


def law_of(update, lr, temperature, **options):
    options = {"lr": lr, "temperature": temperature, **TOY, **options}
    return underdamped_law(update, POSITION, VELOCITY, X, V, X, **options)


def means(flow):
    return X + flow.carry * V - flow.shift * X, flow.keep * V - flow.kick * X


# ------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("temperature", [*TEMPERATURES, 0.0])
@pytest.mark.parametrize("lr", [0.5, 0.09, *STEP_SIZES])
@pytest.mark.parametrize("update", ["naive", "vc"])
def test_marginals_are_the_laws_of_one_coordinate(update, lr, temperature):
    """Position: naive_law or vc_law of its mean and variance. Naive velocity: naive_law of its own; both to 1e-9."""
    law = law_of(update, lr, temperature)
    flow = step_flow(update, "corrected", lr=lr, temperature=temperature, **TOY)
    mean_x, mean_v = means(flow)
    alone = naive_law if update == "naive" else vc_law
    assert (law >= 0).all()
    assert (law.sum((1, 2)) - 1).abs().max() < 1e-12
    assert (law.sum(2) - alone(mean_x, flow.var_x, POSITION)).abs().max() < 1e-9
    if update == "naive":
        assert (law.sum(1) - naive_law(mean_v, flow.var_v, VELOCITY)).abs().max() < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("lr", [0.5, 0.09, 0.02])
def test_naive_law_is_the_integral_taken_in_the_other_order(lr, temperature):
    """Conditioning on the position's noise instead of the velocity's: other kinks, other panels, the same law."""
    flow = step_flow("naive", "corrected", lr=lr, temperature=temperature, **TOY)
    mean_x, mean_v = means(flow)
    swapped = replace(flow, keep=1.0, carry=0.0, kick=0.0, shift=0.0, var_x=flow.var_v, var_v=flow.var_x)
    other = PhaseGrid(SPACE.velocity_format, SPACE.position_format, SPACE.v, SPACE.x)
    row, j, i, mass = pair_masses("naive", mean_v, mean_x, torch.zeros(len(X)).double(), swapped, other)
    found = torch.zeros(len(X), len(SPACE.x), len(SPACE.v), dtype=torch.float64)
    found.index_put_((row, i, j), mass, accumulate=True)
    assert (found - law_of("naive", lr, temperature)).abs().max() < 1e-9


@pytest.mark.parametrize("drift", ["corrected", "paper"])
@pytest.mark.parametrize("update", ["naive", "vc"])
def test_moments_are_those_of_the_exact_integrator(update, drift):
    """Means and covariance of the flow at the published toy's step, where Q^vc reaches the position's variance; naive
    adds the rounding variances, at most a quarter of a squared gap each, and no covariance."""
    lr, fmt, velocity = 0.3, "fixed8.4", "fixed10.5"
    flow = step_flow(update, drift, lr=lr, temperature=1.0, **TOY)
    law = underdamped_law(
        update, fmt, velocity, X[INSIDE], V[INSIDE], X[INSIDE], lr=lr, temperature=1.0, drift=drift, **TOY
    )
    space = PhaseGrid.of(fmt, velocity)
    mean_x, mean_v = (mean[INSIDE] for mean in means(flow))
    dx, dv = space.x - mean_x[:, None], space.v - mean_v[:, None]
    assert (torch.einsum("mij,mi->m", law, dx)).abs().max() < 1e-9
    assert (torch.einsum("mij,mj->m", law, dv)).abs().max() < 1e-9
    assert (torch.einsum("mij,mi,mj->m", law, dx, dv) - flow.cov).abs().max() < 1e-9
    for variance, exact, gap in (
        (torch.einsum("mij,mi->m", law, dx**2), flow.var_x, 2.0**-4),
        (torch.einsum("mij,mj->m", law, dv**2), flow.var_v, 2.0**-5),
    ):
        excess = variance - exact
        assert (excess.abs() < 1e-9).all() if update == "vc" else ((excess > 0) & (excess < gap**2 / 4)).all()


def test_jump_of_a_resting_position_carries_the_covariance():
    """At rest on a grid point Q^vc moves the position by a gap with probability Var ξx/Δ² at most; the velocity's
    conditional mean then is Cov/Var ξx gaps away, 3Δ/2η to leading order, however small the temperature."""
    lr, gap = 0.1, SPACE.position_format.gap
    rest = torch.zeros(1, dtype=torch.float64)
    for temperature in (1e-2, 1e-4):
        law = underdamped_law("vc", POSITION, VELOCITY, rest, rest, rest, lr=lr, temperature=temperature, **TOY)[0]
        flow = step_flow("vc", "corrected", lr=lr, temperature=temperature, **TOY)
        up = law[len(SPACE.x) // 2 + 1]
        assert math.isclose(float(up.sum()), flow.var_x / gap**2 / 2, rel_tol=1e-9)
        jump = float((up * SPACE.v).sum() / up.sum())
        assert math.isclose(jump, flow.cov / flow.var_x * gap, rel_tol=1e-9)
        assert math.isclose(jump, 1.5 * gap / lr, rel_tol=TOY["friction"] * lr)


# ------------------------------------------------------------------------------------------- statistical: the real op


def assert_steps_have(law, update, lr, temperature, drift="corrected"):
    """Steps of the optimizer from every state against the rows of ``law``, at the declared rates."""
    cells = int((law > 0).sum((1, 2)).max())
    draws = draws_for_frequencies(DETECT, cells, len(X), RATE)
    param = torch.nn.Parameter(X.float()[:, None].repeat(1, draws))
    opt = SGHMC(
        [param], lr, num_data=1, temperature=temperature, seed=5, weight_format=POSITION, velocity_format=VELOCITY,
        rescale_velocity=False, variance_corrected=update == "vc", drift=drift, **TOY,
    )  # fmt: skip
    opt.velocity_of(param).copy_(V.float()[:, None].expand(-1, draws))
    param.grad = param.detach().clone()
    opt.step()
    i = ((param.detach().double() - SPACE.x[0]) / SPACE.position_format.gap).long()
    j = ((opt.velocity_of(param).double() - SPACE.v[0]) / SPACE.velocity_format.gap).long()
    outcome = i * len(SPACE.v) + j
    counts = torch.stack([torch.bincount(row, minlength=law[0].numel()) for row in outcome])
    assert_frequencies(counts, law.flatten(1), detect=DETECT, false_fail_rate=RATE)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("lr", STEP_SIZES)
@pytest.mark.parametrize("update", ["naive", "vc"])
def test_real_step_has_the_exact_law(update, lr, temperature):
    """All pairs (x', v') after one step of the optimizer from six states, gradient x."""
    assert_steps_have(law_of(update, lr, temperature), update, lr, temperature)


@pytest.mark.parametrize("drift", ["corrected", "paper"])
@pytest.mark.parametrize("update", ["naive", "vc"])
def test_real_step_of_the_published_toy(update, drift):
    """Its step of 0.09, with the right sign and joint noise and as printed."""
    assert_steps_have(law_of(update, 0.09, 1.0, drift=drift), update, 0.09, 1.0, drift)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"update": "lattice"}, r"`update` must be one of \('naive', 'vc'\), got 'lattice'"),
        ({"drift": "plus"}, r"`drift` must be one of \('corrected', 'paper'\), got 'plus'"),
        ({"lr": 0.0}, "`lr` must be finite and > 0, got 0.0"),
        ({"temperature": -1.0}, "`temperature` must be finite and >= 0, got -1.0"),
        ({"friction": math.inf}, "`friction` must be finite and > 0, got inf"),
    ],
)
def test_refusals_name_argument_and_value(options, match):
    with pytest.raises(ValueError, match=match):
        law_of(**{"update": "vc", "lr": 0.1, "temperature": 1.0, **options})
