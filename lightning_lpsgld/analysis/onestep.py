r"""Exact laws of one rounding: which code comes out, with which probability, for a given mean and noise variance.

Adding a Gaussian and rounding is a convolution with a cardinal B-spline: nearest rounding is the box :math:`B_1`,
stochastic rounding the hat :math:`B_2`, and the large-variance branch of Q^vc (nearest, then the categorical draw of
variance :math:`\Delta^2/4`) the quadratic :math:`B_3`. With :math:`Y \sim N(s, t)` in units of the gap,

.. math::
    P(k) = E\,B_n(Y - k) = \sum_{j=0}^n (-1)^j \binom nj\, h_{n-1}(k - \tfrac n2 + j), \qquad
    h_m(x) = E\,[(Y - x)_+^m] / m!

and the h are closed forms in the normal density and distribution function. Draws are taken as ideal: the real ops use
uniforms of 23 bits and compute means in the dtype of the weight, which moves probabilities by about 1e-7.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lpsgld.formats import FixedPoint, FormatLike, NumberFormat, parse_format
from lightning_lpsgld.ops.lattice import Rates, walk_law
from lightning_lpsgld.ops.reference import variance_plan

__all__ = ["finite_grid", "lattice_law", "naive_law", "rounding_law", "vc_law"]

_SQRT_2PI = math.sqrt(2.0 * math.pi)


def finite_grid(fmt: FormatLike) -> tuple[FixedPoint, Tensor]:
    """The fixed-point format and its values in increasing order, float64, shape ``(2**W,)``.

    Raises:
        TypeError: If ``fmt`` is not a fixed-point format, or has more than 12 bits (the matrices are dense).
    """
    number: NumberFormat = parse_format(fmt)
    if not isinstance(number, FixedPoint) or number.word_length > 12:
        raise TypeError(
            f"Exact laws need a grid that is one small finite set: a fixed-point format of at most 12 bits, such as "
            f"'fixed8.3'; got {number}. A block with a given exponent E is the fixed point of F = W - 2 - E."
        )
    codes = torch.arange(number.code_min, number.code_max + 1, dtype=torch.float64)
    return number, codes * number.gap


def _upper_tail(distance: Tensor, sigma: Tensor, order: int) -> Tensor:
    r""":math:`h_m(x)` for :math:`Y - x \sim N(-distance, sigma^2)`, exact for every sign of ``distance``, sigma > 0."""
    a = distance.abs() / sigma
    density, tail = torch.exp(-0.5 * a * a) / _SQRT_2PI, 0.5 * torch.erfc(a / math.sqrt(2.0))
    below = distance < 0
    if order == 0:
        return torch.where(below, 1.0 - tail, tail)
    if order == 1:
        far = sigma * (density - a * tail)
        return torch.where(below, far - distance, far)
    far = sigma**2 * ((1.0 + a * a) * tail - a * density) / 2
    return torch.where(below, (distance**2 + sigma**2) / 2 - far, far)


def _above(k: Tensor, mean: Tensor, sigma: Tensor, splines: int) -> Tensor:
    """Probability that the rounded value is k or more; accurate where it is small."""
    signs = [(-1) ** j * math.comb(splines - 1, j) for j in range(splines)]
    terms = [sign * _upper_tail(k - splines / 2 + j - mean, sigma, splines - 1) for j, sign in enumerate(signs)]
    return torch.stack(terms).sum(0).clamp(0.0, 1.0)


def _tail(k: Tensor, mean: Tensor, sigma: Tensor, splines: int) -> Tensor:
    """As :func:`_above`, from the complement where k is far below the mean."""
    near = _above(k, mean, sigma, splines)
    return torch.where(k >= mean, near, 1.0 - _above(1.0 - k, -mean, sigma, splines))


def rounding_law(mean: Tensor, variance: Tensor, codes: Tensor, *, splines: int) -> Tensor:
    r"""Law of ``round(mean + N(0, variance))`` saturated to ``codes``; everything in units of the gap.

    Args:
        mean: Means s, float64, shape ``(*)``.
        variance: Variances t >= 0 that broadcast to ``mean``.
        codes: All codes in increasing order, float64, shape ``(K,)``.
        splines: 1: nearest rounding. 2: stochastic rounding. 3: nearest rounding and then Q^vc's categorical draw.

    Returns:
        Probabilities, float64, shape ``(*, K)``.

    Example:
        >>> import torch
        >>> codes = torch.arange(-2.0, 2.0, dtype=torch.float64)
        >>> rounding_law(torch.tensor(0.25, dtype=torch.float64), torch.tensor(0.0), codes, splines=2)
        tensor([0.0000, 0.0000, 0.7500, 0.2500], dtype=torch.float64)
    """
    mean = mean.double()[..., None]
    sigma = torch.as_tensor(variance, dtype=torch.float64).sqrt().expand(mean.shape[:-1])[..., None].clamp(min=1e-150)
    middle = codes.expand(*mean.shape[:-1], -1)
    # By symmetry every code is computed from the side on which it is in the tail: no cancellation far from the mean.
    distance = (middle - mean).abs()
    signs = [(-1) ** j * math.comb(splines, j) for j in range(splines + 1)]
    terms = [sign * _upper_tail(distance - splines / 2 + j, sigma, splines - 1) for j, sign in enumerate(signs)]
    law = torch.stack(terms).sum(0).clamp(min=0.0)
    top = _tail(codes[-1:], mean, sigma, splines)
    bottom = _tail(-codes[:1], -mean, sigma, splines)
    return torch.cat([bottom, law[..., 1:-1], top], dim=-1)


def naive_law(mean: Tensor, variance: float | Tensor, fmt: FormatLike) -> Tensor:
    r"""Law of naive SGLDLP-L's rounding: Gaussian noise of ``variance``, then stochastic rounding, then saturation.

    Args:
        mean: θ − ηg, shape ``(*)``, weight units.
        variance: v >= 0 in squared weight units; broadcasts to ``mean``.
        fmt: Fixed-point format of at most 12 bits.

    Returns:
        Probability of every code in increasing order, float64, shape ``(*, 2**W)``.

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, equation 3.
    """
    number, grid = finite_grid(fmt)
    spread = torch.as_tensor(variance, dtype=torch.float64) / number.gap**2
    return rounding_law(mean.double() / number.gap, spread, grid / number.gap, splines=2)


def vc_law(mean: Tensor, variance: float | Tensor, fmt: FormatLike, *, extra_variance: float = 0.0) -> Tensor:
    r"""Law of :func:`~lightning_lpsgld.ops.quantize_variance_corrected` in both regimes, saturation included.

    Args:
        mean: μ, shape ``(*)``, weight units.
        variance: v >= 0 in squared weight units; broadcasts to ``mean``.
        fmt: Fixed-point format of at most 12 bits.
        extra_variance: Variance of a Gaussian that is added to the mean before, such as η²σ² of gradient noise. Only
            for means in the large-variance regime, where it has a closed form.

    Returns:
        Probability of every code in increasing order, float64, shape ``(*, 2**W)``.

    Raises:
        ValueError: If ``extra_variance`` is given and a mean is in the small-variance regime.

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, algorithm 1.
    """
    number, grid = finite_grid(fmt)
    codes, plan = grid / number.gap, variance_plan(mean.double(), variance, number)
    if extra_variance and not bool(plan.high.all()):
        raise ValueError(
            "vc_law: `extra_variance` has a closed form in the large-variance regime only; average the laws."
        )
    if bool(plan.high.all()):
        return rounding_law(plan.scaled, plan.target - 0.25 + extra_variance / number.gap**2, codes, splines=3)
    small = _four_point_law(plan.scaled, plan.corrective, codes)
    if not bool(plan.high.any()):
        return small
    large = rounding_law(plan.scaled, (plan.target - 0.25).clamp(min=0.0), codes, splines=3)
    return torch.where(plan.high[..., None], large, small)


def _four_point_law(scaled: Tensor, corrective: Tensor, codes: Tensor) -> Tensor:
    """Stochastic rounding and the categorical draw of variance ``corrective``: mass on four neighbours, saturated."""
    lower = scaled.floor()
    p, side = scaled - lower, corrective / 2
    rest = 1.0 - 2.0 * side
    masses = torch.stack([(1 - p) * side, (1 - p) * rest + p * side, p * rest + (1 - p) * side, p * side], dim=-1)
    targets = lower[..., None] + torch.arange(-1.0, 3.0, dtype=torch.float64)
    index = (targets.clamp(float(codes[0]), float(codes[-1])) - codes[0]).long()
    return torch.zeros(*scaled.shape, len(codes), dtype=torch.float64).scatter_add_(-1, index, masses)


def lattice_law(
    theta: Tensor,
    drift: Tensor,
    variance: float,
    fmt: FormatLike,
    *,
    rates: Rates = "exponential",
    curvature: float = 0.0,
) -> Tensor:
    r"""Law of :func:`lightning_lpsgld.ops.lattice.lattice_step`.

    Args:
        theta: θ on the grid, shape ``(M,)``.
        drift: m = −ηg, shape ``(M,)``, weight units.
        variance: v >= 0 in squared weight units.
        fmt: Fixed-point format of at most 12 bits.
        rates: Jump rates of the walk.
        curvature: η·∂²U >= 0 that the walk is told.

    Returns:
        Probability of every code in increasing order, float64, shape ``(M, 2**W)``.
    """
    number, grid = finite_grid(fmt)
    codes, masses, plan = walk_law(theta.double(), drift, variance, number, rates=rates, curvature=curvature)
    index = (codes - grid[0] / number.gap).long()
    walked = torch.zeros(len(theta), len(grid), dtype=torch.float64).scatter_add_(-1, index, masses)
    if not bool(plan.ballistic.any()):
        return walked
    return torch.where(plan.ballistic[..., None], vc_law(theta.double() + drift, variance, number), walked)
