"""Invariant: W2 is the one of the definition, whatever form the target is given in."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from lightning_lpsgld.analysis import best_on_grid, gibbs_on_grid, moments, variance_ratio, wasserstein2

GRID = torch.arange(-64, 64, dtype=torch.float64) / 8
SOME_LAW = torch.softmax(-(GRID**2) / 1.7 + 0.1 * GRID, dim=0)


def normal(loc, scale):
    return Normal(torch.tensor(loc).double(), torch.tensor(scale).double())


def test_shifted_atoms_are_at_the_shift():
    assert math.isclose(wasserstein2(GRID, SOME_LAW, (GRID + 0.3, SOME_LAW)), 0.3, rel_tol=1e-12)
    assert wasserstein2(GRID, SOME_LAW, (GRID, SOME_LAW)) == 0.0


def test_between_atoms_it_is_the_root_mean_square_of_sorted_pairs():
    x, y = torch.tensor([-1.0, 0.5, 2.0, 7.0]).double(), torch.tensor([-3.0, 0.0, 1.0, 1.5]).double()
    quarter = torch.full((4,), 0.25).double()
    expected = (x - y).square().mean().sqrt()
    assert math.isclose(wasserstein2(x, quarter, (y, quarter)), float(expected), rel_tol=1e-12)


def test_point_mass_to_normal():
    """W2² = (x − μ)² + σ²."""
    at = wasserstein2(torch.tensor([2.0]).double(), torch.ones(1).double(), normal(0.5, 3.0))
    assert math.isclose(at, math.sqrt(1.5**2 + 9.0), rel_tol=1e-12)


def test_closed_form_agrees_with_the_quantile_integral():
    """The midpoint rule errs by the tails beyond 1/(2·points), where both laws are normal-like: below 1e-4."""
    target = normal(0.2, 0.8)
    closed = wasserstein2(GRID, SOME_LAW, target)
    assert abs(wasserstein2(GRID, SOME_LAW, target.icdf) - closed) < 1e-4
    assert closed > 0.05


def test_no_law_on_the_grid_is_closer_than_the_rounded_target():
    target = normal(0.03, 0.2)
    grid, best = best_on_grid(GRID, target)
    floor = wasserstein2(grid, best, target)
    assert math.isclose(float(best.sum()), 1.0, rel_tol=1e-12)
    for eps in (1e-3, -1e-3):
        for k in (62, 63, 64, 65):
            other = best.clone()
            other[k] += eps
            other[k + 1] -= eps
            assert wasserstein2(grid, other, target) > floor


def test_best_on_grid_takes_a_distribution_function():
    _, by_normal = best_on_grid(GRID, normal(0.0, 1.0))
    _, by_function = best_on_grid(GRID, normal(0.0, 1.0).cdf)
    assert (by_normal - by_function).abs().max() < 1e-15


def test_gibbs_law_and_moments():
    grid, law = gibbs_on_grid(GRID, GRID**2 / 2, 0.25)
    mean, variance = moments(grid, law)
    assert abs(mean) < 1e-15
    assert abs(variance - 0.25) < 1e-9  # aliasing: exp(−2π²T/Δ²) is 1e-137
    assert abs(variance_ratio(grid, law, 0.25) - 1) < 4e-9


def test_unknown_target_is_refused():
    with pytest.raises(TypeError, match="`target` must be None"):
        wasserstein2(GRID, SOME_LAW, 3.0)
