"""Invariant: the shrinkage measures are those of their definitions, and the bounds hold where their premises do."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers.stats import assert_means_equal, assert_moments, draws_for_means, draws_for_moments
from torch.nn.functional import softplus

from lightning_lpsgld.analysis import (
    ConvergenceModel,
    expected_shrinkage,
    gradient_shrinkage,
    suggest_gradient_format,
)
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.random import DrawKey, normals, uniforms

# ------------------------------------------------------------------------------------------------------- measures


def test_measures_of_a_scaled_gradient():
    g = normals((100,), DrawKey(61))
    s = gradient_shrinkage(0.25 * g, g)
    assert (float(s.norm_ratio), float(s.projection), float(s.zeroed)) == (0.25, 0.25, 0.0)
    assert float(s.cosine) == pytest.approx(1.0, rel=1e-14)
    assert float(s.residual) == 0.0


def test_zero_gradients_make_no_nan():
    zero, some = torch.zeros(5), torch.tensor([0.1, 0.0, -0.2, 0.0, 0.0])
    assert [float(v) for v in gradient_shrinkage(zero, zero)] == [1.0, 1.0, 1.0, 0.0]
    assert [float(v) for v in gradient_shrinkage(zero, some)] == [0.0, 0.0, 0.0, 1.0]
    assert all(v.isfinite() for v in gradient_shrinkage(zero[:0], zero[:0]))
    with pytest.raises(ValueError, match="Shapes must agree"):
        gradient_shrinkage(zero, zero[:3])


#: (format, rounding) -> (norm ratio, projection, residual) at gradient std 0.01, as printed from 1e5 entries.
PUBLISHED = {
    ("fixed8.6", "nearest"): (1.10, 1.00, 0.45),
    ("fixed8.6", "stochastic"): (1.19, 1.00, 0.64),
    ("fixed8.8", "nearest"): (1.006, 1.000, 0.11),
    ("fixed8.8", "stochastic"): (1.012, 1.000, 0.16),
    ("fixed8.4", "nearest"): (0.27, 0.04, 0.26),
    ("fixed8.4", "stochastic"): (2.21, 0.98, 1.98),
}


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case[0]}-{case[1]}")
def test_expected_shrinkage_matches_the_measured_table(case):
    """The table's numbers are estimates from 1e5 entries rounded to 2 or 3 digits; the tolerance is half a digit plus
    five standard errors, σ(g̃g)/(E g² √n) for the projection (the norm ratio errs by half of σ(g̃²)/(E g̃² √n))."""
    fmt, rounding = case
    exact = expected_shrinkage(fmt, 0.01, rounding=rounding)
    g = 0.01 * normals((100_000,), DrawKey(62))
    q = quantize(g, fmt, rounding=rounding, key=DrawKey(63))
    n = math.sqrt(len(g))
    half = 0.0005 if "." in fmt and fmt.endswith("8") else 0.005
    error_projection = float((q * g).std() / g.square().mean()) / n
    error_norm = float(exact.norm_ratio) * float(q.square().std() / q.square().mean()) / n / 2
    norm_ratio, projection, residual = PUBLISHED[case]
    assert abs(float(exact.norm_ratio) - norm_ratio) <= half + 5 * error_norm
    assert abs(float(exact.projection) - projection) <= half + 5 * error_projection
    assert abs(float(exact.residual) - residual) <= 0.005 + 5 * error_norm * norm_ratio / residual


@pytest.mark.parametrize("case", [c for c in PUBLISHED if c != ("fixed8.4", "nearest")], ids="-".join)
def test_real_quantizer_has_the_expected_projection_and_norm(case):
    """E g̃² = norm_ratio² σ², and g̃ − q g has the variance residual² σ² (which fixes the projection q as well).

    Without fixed8.4 to nearest, where one entry in 600 survives: its power would need ten million draws.
    """
    (fmt, rounding), std, detect = case, 0.01, 0.2
    exact, gap, top = expected_shrinkage(fmt, std, rounding=rounding), 2.0 ** -int(fmt[-1]) / std, 6.77
    q, power, rest = float(exact.projection), float(exact.norm_ratio) ** 2, float(exact.residual) ** 2
    reach = gap + abs(1 - q) * top  # |g̃ − g| is at most a gap
    needs = (
        draws_for_moments(power, reach=top + gap, detect=detect),
        draws_for_moments(rest, reach=reach, detect=detect),
    )
    g = std * normals((max(needs),), DrawKey(64))
    rough = quantize(g, fmt, rounding=rounding, key=DrawKey(65))
    assert_moments(rough / std, 0.0, power, reach=top + gap, detect=detect)
    assert_moments((rough - q * g) / std, 0.0, rest, reach=reach, detect=detect)


def test_integers_scaled_to_the_largest_entry():
    """int8 hardly changes a gradient, int4 adds a sixth of it as noise; stochastic rounding more."""
    g = normals((100_000,), DrawKey(68))
    found = {}
    for bits in (8, 4):
        scale = (2 ** (bits - 1) - 1) / g.abs().max()
        for rounding in ("nearest", "stochastic"):
            q = quantize(g * scale, f"fixed{bits}.0s", rounding=rounding, key=DrawKey(69)) / scale
            found[bits, rounding] = gradient_shrinkage(q, g)
            # Residual of rounding with gap Δ: at most Δ/2 (nearest) or p(1−p)Δ² <= Δ²/4, so half a gap over σ.
            assert float(found[bits, rounding].residual) <= 0.5 / scale
    assert abs(float(found[8, "nearest"].norm_ratio) - 1) < float(found[4, "nearest"].norm_ratio) - 1
    for bits in (8, 4):
        assert float(found[bits, "stochastic"].norm_ratio) > float(found[bits, "nearest"].norm_ratio)
        assert float(found[bits, "stochastic"].norm_ratio) > 1


# --------------------------------------------------------------------------------------------------------- bounds

HESSIAN = torch.tensor([0.5, 0.7, 1.0]).double()


def descend(x, q, lr, steps, noise=None):
    """SGD on Σ h x²/2 with gradients q(k)·g + noise(k); the optimality gaps of every step."""
    gaps = []
    for k in range(steps):
        gaps.append(float((HESSIAN * x**2).sum() / 2))
        g = HESSIAN * x
        x = x - lr * (q(k) * g + (0 if noise is None else noise(k)))
    return gaps, x


def test_constant_shrinkage_is_a_smaller_step_bitwise():
    """P1: q a power of two, no noise: the same trajectory, bit for bit, as step size q·μ."""
    start = normals((3,), DrawKey(70))
    _, shrunk = descend(start, lambda k: 0.25, 0.5, 100)
    _, slower = descend(start, lambda k: 1.0, 0.125, 100)
    assert torch.equal(shrunk, slower)


def test_compensated_step_restores_the_curve_and_steps_scale_as_one_over_q():
    """P2."""
    start = normals((3,), DrawKey(71))
    model = ConvergenceModel(lr=0.05, smoothness=1.0, curvature=0.5, q_min=0.25, q_max=0.25)
    _, exact = descend(start, lambda k: 1.0, 0.05, 200)
    _, restored = descend(start, lambda k: 0.25, model.compensated_step_size, 200)
    assert torch.equal(exact, restored)
    full = ConvergenceModel(lr=0.05, smoothness=1.0, curvature=0.5)
    # log(1 − μcq) = −μcq(1 + O(μc)): within μc of the ratio 1/q.
    assert model.steps_to(1e-6, 1.0) / full.steps_to(1e-6, 1.0) == pytest.approx(4.0, rel=0.05 * 0.5)


@pytest.mark.parametrize("q", [1.0, 0.5, 0.2])
def test_contraction_on_a_quadratic_is_the_derived_one(q):
    """For imposed q the gap along curvature h shrinks by (1 − μhq)² a step, which the bound 1 − μ c q covers."""
    lr, steps = 0.3, 60
    for axis, h in enumerate(HESSIAN.tolist()):
        gaps, _ = descend(torch.eye(3).double()[axis], lambda k: q, lr, steps)
        assert gaps[-1] / gaps[0] == pytest.approx((1 - lr * h * q) ** (2 * (steps - 1)), rel=1e-10)
    gaps, _ = descend(normals((3,), DrawKey(72)), lambda k: q, lr, steps)
    model = ConvergenceModel(lr=lr, smoothness=1.0, curvature=0.5, q_min=q, q_max=q)
    for before, after in pairwise(gaps):
        assert after <= model.contraction * before * (1 + 1e-12)


@pytest.mark.parametrize(("fmt", "scale"), [("fixed8.6", 0.01), ("fixed8.6", 0.004), ("e2m1", 0.3)])
def test_contraction_by_the_shrinkage_that_quantization_causes(fmt, scale):
    """Normal gradients rounded to nearest: one step contracts the component along g by 1 − μ q with the predicted q.

    The projection is a mean of independent (g̃_i g_i)/σ² with variance below reach²; 4e5 entries and five standard
    errors of that mean.
    """
    n, lr = 400_000, 0.5
    g = scale * normals((n,), DrawKey(73))
    rough = quantize(g, fmt, rounding="nearest")
    after = g - lr * rough  # U = x²/2: x = g
    measured = float((after * g).sum() / g.square().sum())
    predicted = 1 - lr * float(expected_shrinkage(fmt, scale, rounding="nearest").projection)
    q = float(gradient_shrinkage(rough, g).projection)
    assert measured == pytest.approx(1 - lr * q, rel=1e-12)
    error = lr * float(((rough - q * g) * g).std() / g.square().mean()) / math.sqrt(n)
    assert abs(measured - predicted) <= 5 * error


@pytest.mark.parametrize("compensated", [False, True])
def test_contraction_along_a_trajectory_that_saturates(compensated):
    """U = x²/2 by the real quantizer: |g| > 6 is cut to e2m1's largest value, without a draw, so q_k = 6/|x_k|.

    Every step contracts by 1 − μ q_k, and the gap stays below the bound with the smallest q. The compensated step size
    μ/q_k contracts by 1 − μ.
    """
    lr, x, gaps, predicted = 2.0**-5, torch.full((16,), 48.0).double(), [], 1.0
    for k in range(40):
        q = 6.0 / float(x[0])
        step = ConvergenceModel(lr=lr, smoothness=1.0, q_min=q, q_max=q).compensated_step_size if compensated else lr
        gaps.append(float(x[0]) ** 2 / 2)
        predicted *= 1 - lr if compensated else 1 - lr * q
        x = x - step * quantize(x, "e2m1", key=DrawKey(82, step=k))
    assert float(x[0]) > 6.0, "left the saturated range"
    assert float(x[0]) / 48.0 == pytest.approx(predicted, rel=1e-12)
    if not compensated:
        model = ConvergenceModel(lr=lr, smoothness=1.0, curvature=1.0, q_min=6.0 / 48.0)
        assert all(gap <= model.optimality_gap(k, gaps[0]) * (1 + 1e-12) for k, gap in enumerate(gaps))


def test_contraction_along_a_trajectory_of_stochastic_rounding():
    """Within the range q = 1 on average: 20 steps on U = x²/2 contract the mean by (1 − μ)^20, at a tenth of the gap.

    The noise of step k moves the end by less than μ Δ (1 − μ)^(19 − k), so all ends lie within Δ.
    """
    lr, start, gap, detect = 0.1, 0.3, 2.0**-3, 0.02
    x = torch.full((draws_for_means(detect, 1), 1), start).double()
    for k in range(20):
        x = x - lr * quantize(x, "fixed8.3", key=DrawKey(83, step=k))
    expected = torch.tensor([start * (1 - lr) ** 20]).double()
    assert_means_equal(x, expected, width=gap, detect=detect)


def test_floor_is_linear_in_the_quantization_noise_and_below_the_bound():
    """P3: at fixed q the stationary variance of x' = (1 − μqh)x − μ(qξ + ε) is μ(q²M + σ_ε²)/(qh(2 − μqh))."""
    lr, q, h, m, chains = 0.2, 0.5, 1.0, 0.3, 60_000
    for noise in (0.0, 0.4, 0.8):
        exact = lr * (q**2 * m + noise) / (q * h * (2 - lr * q * h))
        reach = 7 * exact**0.5  # of 60,000 normal draws one lies beyond with probability 1e-7
        assert draws_for_moments(exact, reach=reach, fourth_moment=3 * exact**2, detect=0.1) <= chains
        x = exact**0.5 * normals((chains,), DrawKey(74))
        for k in range(30):
            xi = normals((chains,), DrawKey(75, step=k)) * m**0.5
            eps = normals((chains,), DrawKey(76, step=k)) * noise**0.5
            x = x - lr * (q * (h * x + xi) + eps)
        assert_moments(x, 0.0, exact, reach=reach, fourth_moment=3 * exact**2, detect=0.1)
        model = ConvergenceModel(
            lr=lr, smoothness=h, curvature=h, q_min=q, q_max=q, gradient_noise=m, quantization_noise=noise
        )
        assert h * exact / 2 <= model.floor
        assert model.floor == pytest.approx(lr * (q**2 * m + noise) / (2 * q), rel=1e-12)


def test_bounds_hold_on_logistic_regression():
    """Strongly convex, shrinkage drawn anew in [0.2, 1] each step: every gap is below the bound, and so is the mean
    squared gradient norm."""
    x = normals((200, 4), DrawKey(77))
    y = (uniforms((200,), DrawKey(78)) < torch.sigmoid(x[:, 0])).double()
    ridge = 0.1
    smooth = float(torch.linalg.eigvalsh(x.T @ x / 200).max()) / 4 + ridge

    def value_and_grad(w):
        z = x @ w
        value = (softplus(z) - y * z).mean() + ridge / 2 * w.square().sum()
        return float(value), x.T @ (torch.sigmoid(z) - y) / 200 + ridge * w

    best = torch.zeros(4).double()
    for _ in range(3000):
        best = best - value_and_grad(best)[1] / smooth
    least = value_and_grad(best)[0]
    model = ConvergenceModel(lr=1 / smooth, smoothness=smooth, curvature=ridge, q_min=0.2)
    shrink = 0.2 + 0.8 * uniforms((300,), DrawKey(79))
    w, initial, squares = torch.zeros(4).double(), value_and_grad(torch.zeros(4).double())[0] - least, []
    for k, q in enumerate(shrink.tolist()):
        value, g = value_and_grad(w)
        assert value - least <= model.optimality_gap(k, initial) + 1e-12
        squares.append(float(g.square().sum()))
        w = w - model.lr * q * g
    assert sum(squares) / len(squares) <= model.mean_gradient_norm(len(squares), initial)
    assert value_and_grad(w)[0] - least < 1e-6 * initial


def test_decaying_steps():
    model = ConvergenceModel(lr=1.0, smoothness=1.0, curvature=0.5, q_min=0.5, gradient_noise=1.0)
    assert model.decaying_gap(100, 1.0, beta=8.0, start=10.0) == pytest.approx(32.0 / 110, rel=1e-12)
    with pytest.raises(ValueError, match=r"`beta` must exceed 1/\(c q_min\) = 4"):
        model.decaying_gap(1, 1.0, beta=4.0, start=1.0)


@pytest.mark.parametrize(
    "change", [{"lr": 0.0}, {"q_min": 0.0}, {"q_min": 2.0}, {"curvature": 9.0}, {"noise_growth": 0.5}]
)
def test_model_refuses_numbers_out_of_range(change):
    with pytest.raises(ValueError, match=f"`{next(iter(change))}` must be"):
        ConvergenceModel(**{"lr": 0.1, "smoothness": 1.0, **change})


# ----------------------------------------------------------------------------------------------------- suggestions


def test_suggestion_restores_a_vanished_gradient():
    g = 1e-4 * normals((1000,), DrawKey(80))
    advice = suggest_gradient_format(g, "fixed8.8")
    assert float(advice.before.projection) == 0.0
    assert math.log2(advice.scale).is_integer()
    assert float((g * advice.scale).abs().max()) <= 127 / 256
    assert abs(float(advice.after.projection) - 1) < 0.01
    assert "scale it by 2^" in advice.text


def test_no_suggestion_where_nothing_is_lost():
    g = normals((1000,), DrawKey(81))
    assert suggest_gradient_format(g, "bfp8").text == "Nothing to change."
    assert suggest_gradient_format(torch.zeros(4), "fixed8.8").scale == 1.0
