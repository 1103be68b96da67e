"""Invariant: the joint law of (x, v) is the stationary law of the one-step laws, whichever way it is solved.

Exact: against the whole transition matrix on small formats, and against Lyapunov's equation, which Q^vc obeys on any
grid as long as it reaches its variances. Statistical: running chains of the optimizer keep the law.
"""

from __future__ import annotations

import pytest
import torch
from helpers.stats import assert_frequencies, draws_for_frequencies
from scipy.linalg import solve_discrete_lyapunov

from lightning_lpsgld.analysis import (
    moments,
    phase_space,
    stationary_of,
    underdamped_law,
    underdamped_stationary_law,
)
from lightning_lpsgld.analysis.elimination import stationary_by_levels
from lightning_lpsgld.analysis.extrapolation import stationary_by_steps
from lightning_lpsgld.analysis.stationary import potential_on
from lightning_lpsgld.analysis.underdamped import PhaseGrid, step_flow
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.random import DrawKey, uniforms
from lightning_lpsgld.samplers import SGHMC

TOY = {"friction": 3.0, "inverse_mass": 2.0}


def identity(x):
    return x


def double_well(x):
    return 4 * x**3 - 4 * x + 0.2


def whole_matrix(update, fmt, velocity_format, grad, gradient_format=None, **options):
    """Transition matrix of all states, x major; a gradient between two codes is a mixture of both."""
    space = PhaseGrid.of(fmt, velocity_format)
    x, v = (part.flatten() for part in torch.meshgrid(space.x, space.v, indexing="ij"))
    exact = grad(x)
    if gradient_format is None:
        return underdamped_law(update, fmt, velocity_format, x, v, exact, **options).flatten(1)
    number = parse_format(gradient_format)
    inside = exact.clamp(number.min, number.max)
    lower = (inside / number.gap).floor() * number.gap
    share = ((inside - lower) / number.gap)[:, None]
    below, above = (
        underdamped_law(update, fmt, velocity_format, x, v, force, **options).flatten(1)
        for force in (lower, lower + number.gap)
    )
    return (1 - share) * below + share * above


def stationary_of_all(matrix, fmt, velocity_format, grad):
    """By the elimination of Grassmann, Taksar and Heyman, the most energetic states first."""
    space = PhaseGrid.of(fmt, velocity_format)
    energy = potential_on(space.x, grad)[:, None] + space.v**2 / (2 * TOY["inverse_mass"])
    return stationary_of(matrix / matrix.sum(1, keepdim=True), energy.flatten().argsort())


def full_precision_variance(lr, drift="corrected", joint=True, friction=3.0, inverse_mass=2.0):
    """Stationary variance of x for U = x²/2 at T = 1, by Lyapunov's equation."""
    flow = step_flow("naive", drift, lr=lr, temperature=1.0, friction=friction, inverse_mass=inverse_mass)
    cov = flow.cov if joint else 0.0
    a = torch.tensor([[1 - flow.shift, flow.carry], [-flow.kick, flow.keep]], dtype=torch.float64)
    noise = torch.tensor([[flow.var_x, cov], [cov, flow.var_v]], dtype=torch.float64)
    return float(solve_discrete_lyapunov(a.numpy(), noise.numpy())[0, 0])


# ----------------------------------------------------------------------------------------------------- brute force


@pytest.mark.parametrize("long", [phase_space._LONG, 0], ids=["elimination", "steps"])
@pytest.mark.parametrize("grad", [identity, double_well])
@pytest.mark.parametrize(("update", "drift"), [("naive", "corrected"), ("vc", "corrected"), ("vc", "paper")])
def test_joint_law_is_that_of_the_whole_matrix(update, drift, grad, long, monkeypatch):
    """256 states, a warm and a colder target; both solvers.

    A state outside the kept part may hold the tolerance, and stepping stops at a hundredth of it per step.
    """
    monkeypatch.setattr(phase_space, "_LONG", long)
    for lr, temperature in ((0.1, 1.0), (0.02, 0.2)):
        options = {"lr": lr, "temperature": temperature, "drift": drift, **TOY}
        matrix = whole_matrix(update, "fixed4.2", "fixed4.1", grad, **options)
        expected = stationary_of_all(matrix, "fixed4.2", "fixed4.1", grad)
        x, v, law = underdamped_stationary_law(update, "fixed4.2", "fixed4.1", grad=grad, **options)
        assert (len(x), len(v)) == (16, 16)
        assert abs(float(law.sum()) - 1) < 1e-12
        assert (law.flatten() - expected).abs().max() < 1e-7


def test_rounded_gradient_is_a_mixture():
    options = {"lr": 0.1, "temperature": 1.0, "gradient_format": "fixed4.0", **TOY}
    matrix = whole_matrix("vc", "fixed4.2", "fixed4.1", identity, **options)
    _, _, law = underdamped_stationary_law("vc", "fixed4.2", "fixed4.1", grad=identity, **options)
    assert (law.flatten() - stationary_of_all(matrix, "fixed4.2", "fixed4.1", identity)).abs().max() < 1e-9


def test_a_part_that_is_too_small_is_widened(monkeypatch):
    """From a first guess of one state each way the same law comes out, to the tolerance of what is outside."""
    options = {"lr": 0.1, "temperature": 0.3, "grad": identity, **TOY}
    _, _, expected = underdamped_stationary_law("naive", "fixed6.3", "fixed6.2", **options)

    def small(*_):
        return phase_space.Part(31, 34, 31, 34, 1)

    monkeypatch.setattr(phase_space, "_first_part", small)
    _, _, law = underdamped_stationary_law("naive", "fixed6.3", "fixed6.2", **options)
    assert (law - expected).abs().max() < 1e-7


# ------------------------------------------------------------------------------------------------- Lyapunov's equation


@pytest.mark.parametrize("drift", ["corrected", "paper"])
def test_vc_has_the_variance_of_full_precision(drift):
    """Mean and covariance of a VC step are exact, so second moments obey Lyapunov's equation on a grid as coarse as
    half a standard deviation. Ranges hold 8 standard deviations or more; what is outside weighs below 1e-9."""
    lr = 0.45
    exact = full_precision_variance(lr, drift, joint=drift == "corrected")
    x, _, law = underdamped_stationary_law(
        "vc", "fixed6.1", "fixed6.1", lr=lr, temperature=1.0, grad=identity, drift=drift, **TOY
    )
    assert moments(x, law.sum(1))[1] == pytest.approx(exact, rel=1e-6)


def test_naive_is_warmer_by_what_rounding_adds():
    """With noise of more than half a gap rounding adds a sixth of a squared gap to each of the two, to 1e-2 of it."""
    lr, gap = 0.45, 0.5
    flow = step_flow("naive", "corrected", lr=lr, temperature=1.0, **TOY)
    a = torch.tensor([[1 - flow.shift, flow.carry], [-flow.kick, flow.keep]], dtype=torch.float64)
    added = solve_discrete_lyapunov(a.numpy(), (torch.eye(2).double() * gap**2 / 6).numpy())[0, 0]
    x, _, law = underdamped_stationary_law(
        "naive", "fixed6.1", "fixed6.1", lr=lr, temperature=1.0, grad=identity, **TOY
    )
    excess = moments(x, law.sum(1))[1] - full_precision_variance(lr)
    assert excess == pytest.approx(float(added), rel=1e-2)


def test_small_steps_heat_the_position_by_the_same_amount():
    """Rounding of x + ηv has the variance Δη|v|: Var = T + Δ E|v| (1/2γ + γ/2u) as η falls, from Lyapunov's equation in
    continuous time. Exact up to O(η) and the gap over the speed, with E|v| and Var v of the law itself."""
    gap, temperature = 0.125, 1.0
    gamma, u = TOY["friction"], TOY["inverse_mass"]
    for lr in (4e-3, 1e-3):
        x, v, law = underdamped_stationary_law(
            "vc", "fixed7.3", "fixed7.3", lr=lr, temperature=temperature, grad=identity, tolerance=1e-7, **TOY
        )
        heat = gap * float(law.sum(0) @ v.abs())
        predicted = temperature + heat * (1 / (2 * gamma) + gamma / (2 * u))
        assert moments(x, law.sum(1))[1] == pytest.approx(predicted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("update", ["vc", "naive"])
def test_published_toy(update):
    """fixed8.4, η = 0.09: VC has the 1.031 of full precision, naive rounding adds 0.7 % to it."""
    x, _, law = underdamped_stationary_law(
        update, "fixed8.4", "fixed8.4", lr=0.09, temperature=1.0, grad=identity, **TOY
    )
    ratio = moments(x, law.sum(1))[1] / full_precision_variance(0.09)
    # The velocity's range ends at 5.7 standard deviations: it clips a variance of about 1e-6.
    assert abs(ratio - 1) < 1e-4 if update == "vc" else 1.006 < ratio < 1.009


# ------------------------------------------------------------------------------------------------ the two solvers


def birth_death(up, down):
    size = len(up) + 1
    matrix = torch.diag(up, 1) + torch.diag(down, -1)
    return matrix + torch.diag(1 - matrix.sum(1)), size


def test_elimination_keeps_small_probabilities():
    """Single states as levels, falling by 1e-6 a state on both sides: every probability to 10 digits."""
    ratio, half = 1e-6, 8
    up = torch.tensor([0.4] * half + [0.4 * ratio] * half, dtype=torch.float64)
    down = torch.tensor([0.4 * ratio] * half + [0.4] * half, dtype=torch.float64)
    matrix, size = birth_death(up, down)

    def level(k):
        return matrix[k : k + 1, max(k - 1, 0) : k], matrix[k : k + 1, k : k + 1], matrix[k : k + 1, k + 1 : k + 2]

    law = torch.cat(stationary_by_levels(level, size, half, 0))
    distance = (torch.arange(size) - half).abs().double()
    assert torch.allclose(law, law[half] * ratio**distance, rtol=1e-10, atol=0)


def test_elimination_refuses_a_chain_that_falls_apart():
    """The lower of two levels is never left."""
    none, one = torch.zeros(1, 0).double(), torch.ones(1, 1).double()
    levels = [(none, one, 0 * one), (0 * one, one, none)]
    with pytest.raises(ValueError, match="falls apart"):
        stationary_by_levels(levels.__getitem__, 2, 1, 0)


def reflected(law):
    """One step of the walk that goes up or down with a quarter each and stays at walls."""
    up, down = torch.cat([law[:1], law[:-1]]), torch.cat([law[1:], law[-1:]])
    return law / 2 + (up + down) / 4


@pytest.mark.parametrize("size", [60, 4000])
def test_extrapolation_is_faster_than_relaxation_and_refuses_what_it_cannot_do(size):
    """60 states relax in 1,460 steps, so plain stepping takes 30,000 for nine digits; a tenth of that is enough. 4,000
    states relax in 6 million: refused."""
    start, steps = torch.zeros(size, dtype=torch.float64), []
    start[0] = 1.0

    def step(law):
        steps.append(1)
        return reflected(law)

    if size == 60:
        law = stationary_by_steps(step, start, 1e-13)
        assert (law - 1 / size).abs().max() < 1e-9
        assert len(steps) < 3000
    else:
        with pytest.raises(ValueError, match="mixes too slowly"):
            stationary_by_steps(step, start, 1e-13)


# --------------------------------------------------------------------------------------------- running chains keep it


@pytest.mark.parametrize(("update", "temperature"), [("naive", 1.0), ("vc", 1.0), ("vc", 0.01)])
def test_running_chains_keep_the_law(update, temperature):
    """Independent chains started from the exact law have its position after 40 steps of 0.05 (two relaxation times)."""
    lr, fmt, velocity_format, detect = 0.05, "fixed7.2", "fixed7.3", 0.1
    x, v, law = underdamped_stationary_law(
        update, fmt, velocity_format, lr=lr, temperature=temperature, grad=identity, **TOY
    )
    chains = draws_for_frequencies(detect, len(x))
    state = torch.searchsorted(law.flatten().cumsum(0), uniforms((chains,), DrawKey(31))).clamp(max=law.numel() - 1)
    param = torch.nn.Parameter(x[state // len(v)].float())
    opt = SGHMC(
        [param], lr, num_data=1, temperature=temperature, seed=32, weight_format=fmt, velocity_format=velocity_format,
        rescale_velocity=False, variance_corrected=update == "vc", **TOY,
    )  # fmt: skip
    opt.velocity_of(param).copy_(v[state % len(v)])
    for _ in range(40):
        param.grad = param.detach().clone()
        opt.step()
    counts = torch.bincount(((param.detach().double() - x[0]) / (x[1] - x[0])).long(), minlength=len(x))
    position = law.sum(1)
    assert torch.equal(quantize(param.detach(), fmt, rounding="nearest"), param.detach())
    assert_frequencies(counts, position / position.sum(), detect=detect)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refusals_name_argument_and_value():
    options = {"lr": 0.1, "temperature": 1.0, "grad": identity, **TOY}
    with pytest.raises(ValueError, match=r"`temperature` must be finite and > 0 .*, got 0.0"):
        underdamped_stationary_law("vc", "fixed4.2", "fixed4.2", **{**options, "temperature": 0.0})
    with pytest.raises(ValueError, match=r"`tolerance` must be in \[1e-13, 1e-3\], got 0.5"):
        underdamped_stationary_law("vc", "fixed4.2", "fixed4.2", **options, tolerance=0.5)
    with pytest.raises(TypeError, match=r"at most 12 bits.* got bfp8"):
        underdamped_stationary_law("vc", "bfp8", "fixed4.2", **options)
