r"""How far a law on a grid is from its target: Wasserstein-2 distance, the best law on the grid, moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Union

import torch
from torch import Tensor
from torch.distributions import Normal

__all__ = ["best_on_grid", "gibbs_on_grid", "moments", "variance_ratio", "wasserstein2"]

Target = Union[Normal, tuple[Tensor, Tensor], Callable[[Tensor], Tensor], None]

_STANDARD = Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))


def moments(grid: Tensor, probability: Tensor) -> tuple[float, float]:
    """Mean and variance of a law on a grid.

    Args:
        grid: Values, shape ``(points,)``.
        probability: Their probabilities, the same shape, summing to 1.

    Returns:
        Mean and variance, in the unit of the grid and its square.
    """
    mean = (probability * grid).sum()
    return float(mean), float((probability * (grid - mean) ** 2).sum())


def variance_ratio(grid: Tensor, probability: Tensor, variance: float = 1.0) -> float:
    """Variance of a law on a grid as a multiple of the target's.

    Args:
        grid: Values, shape ``(points,)``.
        probability: Their probabilities, the same shape, summing to 1.
        variance: The target's.

    Returns:
        1 where the law is as wide as the target.
    """
    return moments(grid, probability)[1] / variance


def _cuts(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Standard normal quantiles at the ends of every atom's share of (0, 1); each tail from its own side."""
    below = probability.cumsum(0).clamp(max=1.0)
    above = probability.flip(0).cumsum(0).flip(0).clamp(max=1.0)
    above = torch.cat([above[1:], above.new_zeros(1)])
    upper = torch.where(below < 0.5, torch.special.ndtri(below), -torch.special.ndtri(above))
    upper[-1] = math.inf
    return torch.cat([upper.new_full((1,), -math.inf), upper[:-1]]), upper


def _to_normal(grid: Tensor, probability: Tensor, target: Normal) -> Tensor:
    low, high = _cuts(probability)
    loc, scale = target.loc.double(), target.scale.double()

    def density(z: Tensor) -> Tensor:
        return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    def weighted(z: Tensor) -> Tensor:
        return torch.where(z.isfinite(), z * density(z), torch.zeros_like(z))

    # Integral of (x - loc - scale z)^2 over each atom's share of z, with the mass that the share really has.
    mass = torch.where(low > 0, _tail(low) - _tail(high), _tail(-high) - _tail(-low))
    first = density(low) - density(high)
    second = mass + weighted(low) - weighted(high)
    shift = grid - loc
    return (shift**2 * mass - 2 * shift * scale * first + scale**2 * second).sum()


def _tail(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(z / math.sqrt(2.0))


def _to_atoms(grid: Tensor, probability: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    ends = torch.cat([probability.cumsum(0), weight.cumsum(0)]).clamp(max=1.0).sort().values
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    middle = (starts + ends) / 2
    return ((ends - starts) * (_quantile(grid, probability, middle) - _quantile(other, weight, middle)) ** 2).sum()


def _quantile(grid: Tensor, probability: Tensor, u: Tensor) -> Tensor:
    return grid[torch.searchsorted(probability.cumsum(0), u).clamp(max=len(grid) - 1)]


def wasserstein2(grid: Tensor, probability: Tensor, target: Target = None, *, points: int = 200_000) -> float:
    r"""Wasserstein-2 distance :math:`(\int_0^1 (F^{-1}(u) - G^{-1}(u))^2\,du)^{1/2}` of a law on a line to its target.

    Args:
        grid: Values in increasing order, float64, shape ``(K,)``.
        probability: Their probabilities, shape ``(K,)``.
        target: ``None``: N(0, 1). A ``torch.distributions.Normal`` (both: closed form). A pair of values in increasing
            order and probabilities (exact). Or a quantile function on (0, 1), integrated by the midpoint rule.
        points: Of the midpoint rule.

    Returns:
        The distance, in units of ``grid``.

    Raises:
        TypeError: If ``target`` is none of these.

    Example:
        >>> grid, p = best_on_grid(torch.arange(-8, 8, 0.125, dtype=torch.float64))
        >>> round(wasserstein2(grid, p), 4)
        0.0361
    """
    grid, probability = grid.double(), probability.double() / probability.double().sum()
    if target is None or isinstance(target, Normal):
        square = _to_normal(grid, probability, _STANDARD if target is None else target)
    elif isinstance(target, tuple):
        square = _to_atoms(grid, probability, target[0].double(), target[1].double() / target[1].double().sum())
    elif callable(target):
        u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
        square = ((_quantile(grid, probability, u) - target(u)) ** 2).mean()
    else:
        raise TypeError(
            f"`target` must be None, a Normal, a pair (values, probabilities) or a function, got {target!r}."
        )
    return math.sqrt(max(float(square), 0.0))


def best_on_grid(grid: Tensor, target: Normal | Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    r"""The law on the grid that is closest to the target in W2: every target value goes to the nearest grid value.

    Args:
        grid: Values in increasing order, shape ``(K,)``.
        target: ``None`` for N(0, 1), a ``Normal``, or a distribution function.

    Returns:
        ``grid`` and the probabilities, float64. With a gap Δ that is small against the target its variance is larger
        than the target's by :math:`\Delta^2/12` and its W2 distance :math:`\Delta/\sqrt{12}`.

    Example:
        >>> grid, p = best_on_grid(torch.tensor([-1.0, 0.0, 1.0]))
        >>> p
        tensor([0.3085, 0.3829, 0.3085], dtype=torch.float64)
    """
    grid = grid.double()
    middles = (grid[1:] + grid[:-1]) / 2
    if target is None or isinstance(target, Normal):
        normal = _STANDARD if target is None else target
        z = (middles - normal.loc.double()) / normal.scale.double()
        ends = torch.cat([z.new_full((1,), -math.inf), z, z.new_full((1,), math.inf)])
        low, high = ends[:-1], ends[1:]
        return grid, torch.where(low > 0, _tail(low) - _tail(high), _tail(-high) - _tail(-low))
    cdf = torch.cat([middles.new_zeros(1), target(middles), middles.new_ones(1)])
    return grid, cdf.diff()


def gibbs_on_grid(grid: Tensor, potential: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    r"""The target restricted to the grid: :math:`P(\theta_k) \propto \exp(-U(\theta_k)/T)`.

    Args:
        grid: Values, shape ``(K,)``.
        potential: U at them.
        temperature: T > 0.

    Returns:
        ``grid`` and the probabilities, float64. It is the law of a reversible walk with Metropolis ratios; its variance
        is the target's as long as the gap is below about two of its standard deviations, and falls to 0 beyond.
    """
    return grid.double(), torch.softmax(-potential.double() / temperature, dim=0)
