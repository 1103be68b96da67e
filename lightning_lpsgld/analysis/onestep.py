r"""Exact laws of one rounding: which code comes out, with which probability, for a given mean and noise variance.

Adding a Gaussian and rounding is a convolution with a B-spline (:mod:`lightning_lpsgld.ops.splines`). Draws are taken
as ideal: the real ops use uniforms of 23 bits and compute means in the dtype of the weight, which moves probabilities
by about 1e-7. Blocks of one element, whose exponent follows their value, are in :mod:`.block_laws`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lpsgld.formats import FixedPoint, FormatLike, NumberFormat, parse_format
from lightning_lpsgld.ops.lattice import Rates, walk_law
from lightning_lpsgld.ops.reference import variance_plan
from lightning_lpsgld.ops.splines import four_points, spline_masses

__all__ = [
    "Masses",
    "finite_grid",
    "lattice_law",
    "lattice_masses",
    "naive_law",
    "naive_masses",
    "rounding_masses",
    "vc_law",
    "vc_masses",
]


def finite_grid(fmt: FormatLike) -> tuple[FixedPoint, Tensor]:
    """The fixed-point format and its values in increasing order, float64, shape ``(2**W,)``.

    Raises:
        TypeError: If ``fmt`` is not a fixed-point format, or has more than 12 bits (the matrices are dense).
    """
    number: NumberFormat = parse_format(fmt)
    if not isinstance(number, FixedPoint) or number.word_length > 12:
        raise TypeError(
            f"Exact laws need a grid that is one small finite set: a fixed-point format of at most 12 bits, such as "
            f"'fixed8.3'; got {number}. A block whose exponent E stays is the fixed point of F = W - 2 - E."
        )
    codes = torch.arange(number.code_min, number.code_max + 1, dtype=torch.float64)
    return number, codes * number.gap


#: Flat coordinate form of laws: row, index of the code, mass; entries of one pair add up.
Masses = tuple[Tensor, Tensor, Tensor]


def rounding_masses(mean: Tensor, variance: Tensor, codes: Tensor, *, splines: int) -> Masses:
    r"""Law of ``round(mean + N(0, variance))`` saturated to ``codes``; everything in units of the gap.

    Args:
        mean: Means s, float64, shape ``(M,)``.
        variance: Variances t >= 0 that broadcast to ``mean``.
        codes: All codes in increasing order, float64, shape ``(K,)``.
        splines: 1: nearest rounding. 2: stochastic rounding. 3: nearest rounding and then Q^vc's categorical draw.

    Returns:
        Masses; what lies beyond the codes is in the first or the last.
    """
    targets, mass = spline_masses(mean, variance, splines)
    return _flat(targets, mass, codes)


def _flat(targets: Tensor, mass: Tensor, codes: Tensor) -> Masses:
    """Saturate target codes, shape ``(M, w)``, and flatten."""
    index = (targets.clamp(float(codes[0]), float(codes[-1])) - codes[0]).long()
    row = torch.arange(len(targets))[:, None].expand_as(index)
    return row.flatten(), index.flatten(), mass.flatten()


def _dense(masses: Masses, shape: torch.Size, states: int) -> Tensor:
    row, index, mass = masses
    out = torch.zeros(math.prod(shape), states, dtype=torch.float64)
    return out.index_put_((row, index), mass, accumulate=True).reshape(*shape, states)


def _joined(choose: Tensor, first: Masses, second: Masses) -> Masses:
    """Rows of ``first`` where ``choose`` is set, of ``second`` elsewhere."""
    keep = [(first, choose[first[0]]), (second, ~choose[second[0]])]
    row, index, mass = (torch.cat([masses[i][mask] for masses, mask in keep]) for i in range(3))
    return row, index, mass


def naive_masses(mean: Tensor, variance: float | Tensor, fmt: FixedPoint, grid: Tensor) -> Masses:
    """As :func:`naive_law`, flat; ``mean`` of shape ``(M,)``."""
    spread = torch.as_tensor(variance, dtype=torch.float64) / fmt.gap**2
    return rounding_masses(mean.double() / fmt.gap, spread, grid / fmt.gap, splines=2)


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
    spread = torch.as_tensor(variance, dtype=torch.float64).expand(mean.shape).flatten()
    return _dense(naive_masses(mean.flatten(), spread, number, grid), mean.shape, len(grid))


def vc_masses(
    mean: Tensor, variance: float | Tensor, fmt: FixedPoint, grid: Tensor, extra_variance: float | Tensor = 0.0
) -> Masses:
    """As :func:`vc_law`, flat; ``mean`` of shape ``(M,)``; ``extra_variance`` counts in the large-variance regime."""
    codes, plan = grid / fmt.gap, variance_plan(mean.double(), variance, fmt)
    large = (plan.target - 0.25).clamp(min=0.0) + extra_variance / fmt.gap**2
    if bool(plan.high.all()):
        return rounding_masses(plan.scaled, large, codes, splines=3)
    small = _flat(*four_points(plan.scaled, plan.corrective), codes)
    if not bool(plan.high.any()):
        return small
    return _joined(plan.high, rounding_masses(plan.scaled, large, codes, splines=3), small)


def vc_law(mean: Tensor, variance: float | Tensor, fmt: FormatLike) -> Tensor:
    r"""Law of :func:`~lightning_lpsgld.ops.quantize_variance_corrected` in both regimes, saturation included.

    Args:
        mean: μ, shape ``(*)``, weight units.
        variance: v >= 0 in squared weight units; broadcasts to ``mean``.
        fmt: Fixed-point format of at most 12 bits.

    Returns:
        Probability of every code in increasing order, float64, shape ``(*, 2**W)``.

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, algorithm 1.
    """
    number, grid = finite_grid(fmt)
    spread = torch.as_tensor(variance, dtype=torch.float64).expand(mean.shape).flatten()
    return _dense(vc_masses(mean.flatten(), spread, number, grid), mean.shape, len(grid))


def lattice_masses(
    theta: Tensor,
    drift: Tensor,
    variance: float,
    fmt: FixedPoint,
    grid: Tensor,
    rates: Rates,
    curvature: float,
    gradient_std: float | Tensor = 0.0,
) -> Masses:
    """As :func:`lattice_law`, flat."""
    codes, masses, plan = walk_law(
        theta.double(), drift, variance, fmt, rates=rates, curvature=curvature, gradient_std=gradient_std
    )
    walked = _flat(codes, masses, grid / fmt.gap)
    if not bool(plan.ballistic.any()):
        return walked
    return _joined(plan.ballistic, vc_masses(theta.double() + drift, variance, fmt, grid), walked)


def lattice_law(
    theta: Tensor,
    drift: Tensor,
    variance: float,
    fmt: FormatLike,
    *,
    rates: Rates = "exponential",
    curvature: float = 0.0,
    gradient_std: float | Tensor = 0.0,
) -> Tensor:
    r"""Law of :func:`lightning_lpsgld.ops.lattice.lattice_step`, given the drift.

    Args:
        theta: θ on the grid, shape ``(M,)``.
        drift: m = −ηg, shape ``(M,)``, weight units.
        variance: v >= 0 in squared weight units.
        fmt: Fixed-point format of at most 12 bits.
        rates: Jump rates of the walk.
        curvature: η·∂²U >= 0 that the walk is told.
        gradient_std: η·s >= 0 that it is told, of ``"exponential"`` only; float or shape ``(M,)``.

    Returns:
        Probability of every code in increasing order, float64, shape ``(M, 2**W)``.
    """
    number, grid = finite_grid(fmt)
    masses = lattice_masses(theta, drift, variance, number, grid, rates, curvature, gradient_std)
    return _dense(masses, theta.shape, len(grid))
