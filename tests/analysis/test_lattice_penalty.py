"""The lattice walk with exponential rates, told the noise of its gradient: the law of the target comes back.

Exact, by averaging one-step laws over the noise; and the real op, with real noise, against those laws.
"""

from __future__ import annotations

import pytest
import torch
from helpers.stats import assert_frequencies, draws_for_frequencies

from lightning_lpsgld.analysis import gibbs_on_grid, moments, stationary_law, transition_matrix
from lightning_lpsgld.analysis.onestep import finite_grid
from lightning_lpsgld.ops import lattice_step
from lightning_lpsgld.ops.lattice import walk_law
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id

FORMAT, GAP = "fixed6.3", 0.125
TEMPERATURE, LR = 0.1, 2e-4


def identity(x):
    return x


def noise(strength):
    """The noise that a control variate at 0 leaves, c|θ|; ``strength`` is Δs/2T at two standard deviations."""
    return lambda x: strength * 2 * TEMPERATURE / GAP * x.abs() / (2 * TEMPERATURE**0.5)


def noisy_law(std, penalty, lr=LR):
    options = {"lr": lr, "temperature": TEMPERATURE, "grad": identity, "curvature": 0.0}
    return stationary_law("lattice", FORMAT, gradient_std=std, penalty=penalty, **options)


@pytest.mark.parametrize(("target", "spread"), [(0.01, 0.2), (1e-4, 1.0), (0.3, 0.2), (2.0, 0.02)])
def test_odds_are_right_on_average_over_the_noise(target, spread):
    """E p(y + σζ) with the penalty is p(y) without noise, jumps of several gaps (target 2) included.

    Midpoint rule out to 7 standard deviations of the tilted normal and more; that the cap is not reached is checked.
    """
    variance, drift, count = target * GAP**2, 0.1 * target * GAP, 4000
    z = (torch.arange(count, dtype=torch.float64) + 0.5) / count * 16 - 8
    weight = torch.exp(-z * z / 2) / torch.exp(-z * z / 2).sum()
    std = spread * variance / GAP  # of the drift, so that that of y = gap * drift / variance is ``spread``
    fmt, _ = finite_grid(FORMAT)
    clean = walk_law(torch.zeros(1).double(), torch.tensor([drift], dtype=torch.float64), variance, fmt)
    noisy = walk_law(torch.zeros(count).double(), drift + std * z, variance, fmt, gradient_std=std)
    assert not noisy[2].capped.any()
    assert torch.equal(noisy[0][0], clean[0][0])
    average = (weight[:, None] * noisy[1]).sum(0)
    assert torch.allclose(average, clean[1][0], rtol=1e-9, atol=1e-12)
    untold = walk_law(torch.zeros(count).double(), drift + std * z, variance, fmt)
    up = (weight[:, None] * untold[1]).sum(0)[0] / clean[1][0, 0]
    assert float(up) == pytest.approx(float(torch.tensor(spread**2 / 2).exp()), rel=1e-6)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_noise_that_depends_on_the_state_bends_the_law_and_the_penalty_restores_it(strength):
    """Untold, the law is exp(−U/T − Δ²s²/8T²): narrower by 1/(1 + Δ²c²/4T). Told, within 0.02 % of exp(−U/T)."""
    grid, told = noisy_law(noise(strength), True)
    _, untold = noisy_law(noise(strength), False)
    _, right = gibbs_on_grid(grid, grid**2 / 2, TEMPERATURE)
    c = strength * TEMPERATURE**0.5 / GAP
    _, bent = gibbs_on_grid(grid, grid**2 / 2 + GAP**2 * c**2 * grid**2 / (8 * TEMPERATURE), TEMPERATURE)
    variance = moments(grid, right)[1]
    assert abs(moments(grid, told)[1] / variance - 1) < 2e-4
    assert abs(moments(grid, untold)[1] / variance - 1) > 0.01
    assert moments(grid, untold)[1] == pytest.approx(moments(grid, bent)[1], rel=2e-3)
    assert float((told - right).abs().sum()) < 1e-3


def test_where_odds_are_cut_off_the_penalty_does_not_help():
    """Δs/2T = 3 at two standard deviations: untold far too narrow, told far too wide."""
    grid, told = noisy_law(noise(3.0), True)
    _, untold = noisy_law(noise(3.0), False)
    assert moments(grid, untold)[1] < 0.5 * TEMPERATURE
    assert moments(grid, told)[1] > 2 * TEMPERATURE


def test_noise_that_depends_on_the_state_has_its_naive_closed_form():
    """With one deviation per state, a row is that of a chain with this deviation everywhere; 1e-20 is negligible."""
    std = noise(0.5)
    options = {"lr": 0.1, "temperature": TEMPERATURE, "grad": identity}
    _, grid = finite_grid(FORMAT)
    matrix = transition_matrix("naive", FORMAT, gradient_std=std, **options)
    for row in (20, 32, 40):
        alone = transition_matrix("naive", FORMAT, gradient_std=float(std(grid[row])), **options)
        assert torch.allclose(matrix[row], alone[row], rtol=1e-12, atol=1e-19)


def test_refuses_noise_that_is_none():
    with pytest.raises(ValueError, match="`gradient_std` must be finite and >= 0"):
        noisy_law(identity, False)


# ----------------------------------------------------------------------------------------------- statistical: the op

STATES = torch.tensor([-1.0, -0.125, 0.0, 0.5])
DETECT = 0.1
DRAWS = draws_for_frequencies(DETECT, 64, len(STATES))


@pytest.mark.parametrize("lr", [2e-2, 2e-3])
def test_real_step_on_noisy_gradients_has_the_rows_of_the_transition_matrix(lr):
    """Gradients θ + s(θ)ζ from six states; chi-square over all outcomes, the cap and Q^vc's part included."""
    std = noise(1.0)
    matrix = transition_matrix(
        "lattice", FORMAT, lr=lr, temperature=TEMPERATURE, grad=identity, gradient_std=std, penalty=True
    )
    theta = STATES[:, None].repeat(1, DRAWS)
    zeta = normals(theta.shape, DrawKey(91, stream=stream_id(Role.PROBE, 0))).float()
    drift = -lr * (theta + std(theta) * zeta)
    new = lattice_step(theta, drift, 2 * lr * TEMPERATURE, FORMAT, key=DrawKey(92), gradient_std=lr * std(theta))
    fmt, grid = finite_grid(FORMAT)
    codes = ((new.double() - grid[0]) / fmt.gap).long()
    counts = torch.stack([torch.bincount(row, minlength=len(grid)) for row in codes])
    assert_frequencies(counts, matrix[((STATES.double() - grid[0]) / fmt.gap).long()], detect=DETECT)
