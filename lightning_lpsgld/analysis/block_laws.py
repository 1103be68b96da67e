r"""Exact laws of a block of one element (a bias, a batch-norm scale), powers of two and their crossing included.

Such a block is a number :math:`k 2^{E-W+2}` whose exponent follows its magnitude, so that all its values form one grid,
finer towards zero; taking the next exponent by coins is, in law, rounding stochastically onto that grid. With few
exponent bits the grid is one small finite set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.formats import BlockFloatingPoint, FormatLike, parse_format
from lightning_lpsgld.formats.exponents import power_of_two
from lightning_lpsgld.ops.reference import variance_plan
from lightning_lpsgld.ops.splines import four_points, spline_masses, upper_moment

__all__ = ["block_grid", "naive_block_masses", "vc_block_masses"]

Masses = tuple[Tensor, Tensor, Tensor]


def block_grid(fmt: FormatLike) -> tuple[BlockFloatingPoint, Tensor]:
    """The format and all values of a block of one element in increasing order, float64.

    Raises:
        TypeError: If ``fmt`` is not a block format of at most 8 bits with at most 4 bits of exponent.
    """
    number = parse_format(fmt)
    if not isinstance(number, BlockFloatingPoint) or number.word_length > 8 or number.exponent_bits > 4:
        raise TypeError(
            f"Exact laws of a block need one small finite set: at most 8 bits and 4 bits of exponent, as in 'bfp8e3' "
            f"(2^-4 to 2^3); got {number}."
        )
    codes = torch.arange(number.code_min, number.code_max + 1, dtype=torch.float64)
    gaps = [number.gap_at(exponent) for exponent in range(number.exponent_min, number.exponent_max + 1)]
    return number, torch.cat([codes * gap for gap in gaps]).unique()


def vc_block_masses(mean: Tensor, variance: float, fmt: BlockFloatingPoint, grid: Tensor) -> Masses:
    """Law of Q^vc for blocks of one element.

    Args:
        mean: μ, shape ``(M,)``, weight units.
        variance: v >= 0.
        fmt: As :func:`block_grid` gave it, with the grid.
        grid: Its values.

    Returns:
        Row, index in the grid and mass of every possible value, flat; entries of one pair add up.
    """
    plan = variance_plan(mean.double(), variance, fmt)
    gap = power_of_two(plan.gap_exponents).expand(mean.shape)
    found = []
    for chosen in (~plan.gaussian, plan.gaussian):
        at = chosen.nonzero()[:, 0]
        if not at.numel():
            continue
        if bool(plan.gaussian[at[0]]):
            codes, mass = spline_masses(plan.scaled[at], (plan.target[at] - 0.25).clamp(min=0.0), 3)
        else:
            codes, mass = four_points(plan.scaled[at], plan.corrective[at])
        if fmt.top == "clamp":
            codes = codes.clamp(fmt.code_min, fmt.code_max)
        row = at[:, None].expand(codes.shape)
        found.append(_onto(row.flatten(), (codes * gap[at, None]).flatten(), mass.flatten(), grid))
    return _joined(found)


def naive_block_masses(mean: Tensor, variance: float | Tensor, fmt: BlockFloatingPoint, grid: Tensor) -> Masses:
    """Law of Gaussian noise and then stochastic rounding, for blocks of one element; as :func:`vc_block_masses`."""
    sigma = torch.as_tensor(variance, dtype=torch.float64).expand(mean.shape).sqrt().clamp(min=1e-150)[:, None]
    distance = grid - mean.double()[:, None]
    above = _hats(distance, sigma, grid)
    # Hats from the side on which the value is in the tail: no cancellation far from the mean.
    below = _hats(-distance.flip(1), sigma, -grid.flip(0)).flip(1)
    mass = torch.where(distance > 0, above, below).clamp(min=0.0)
    if fmt.top == "clamp":
        mass = _held_down(mass, distance, sigma, fmt, grid)
    row = torch.arange(len(mean))[:, None].expand(mass.shape)
    index = torch.arange(len(grid)).expand(mass.shape)
    return row.flatten(), index.flatten(), mass.flatten()


def _hats(distance: Tensor, sigma: Tensor, grid: Tensor) -> Tensor:
    """E of the hat functions of a grid of changing gaps, the outermost open; ``distance`` is grid - mean."""
    tail = upper_moment(distance, sigma, 1)
    up = (tail[:, :-1] - tail[:, 1:]) / grid.diff()  # E of the way from one value to the next, in [0, 1]
    ends = torch.ones_like(up[:, :1]), torch.zeros_like(up[:, :1])
    return torch.cat([ends[0], up], 1) - torch.cat([up, ends[1]], 1)


def _held_down(mass: Tensor, distance: Tensor, sigma: Tensor, fmt: BlockFloatingPoint, grid: Tensor) -> Tensor:
    """Move what stochastic rounding would carry over a power of two back to the last code before it."""
    mass = mass.clone()
    for sign in (1.0, -1.0):
        for exponent in range(fmt.exponent_min, fmt.exponent_max):
            ends = torch.tensor([fmt.code_max, fmt.code_max + 1], dtype=torch.float64) * fmt.gap_at(exponent) * sign
            low, high = torch.searchsorted(grid, ends).tolist()
            near, far = sign * distance[:, low, None], sign * distance[:, high, None]
            carried = (upper_moment(near, sigma, 1) - upper_moment(far, sigma, 1)) / fmt.gap_at(exponent)
            moved = (carried - upper_moment(far, sigma, 0))[:, 0].clamp(min=0.0)
            mass[:, low] += moved
            mass[:, high] = (mass[:, high] - moved).clamp(min=0.0)
    return mass


def _onto(row: Tensor, values: Tensor, mass: Tensor, grid: Tensor) -> Masses:
    """Round values stochastically onto the grid, saturating; those on it stay."""
    values = values.clamp(float(grid[0]), float(grid[-1]))
    upper = torch.searchsorted(grid, values)
    lower = (upper - 1).clamp(min=0)
    width = grid[upper] - grid[lower]
    share = torch.where(width > 0, (values - grid[lower]) / width.clamp(min=1e-300), 1.0)
    return _joined([(row, upper, mass * share), (row, lower, mass * (1.0 - share))])


def _joined(parts: list[Masses]) -> Masses:
    row, index, mass = (torch.cat([part[i] for part in parts]) for i in range(3))
    return row, index, mass
