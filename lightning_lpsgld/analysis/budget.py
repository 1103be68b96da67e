"""Where the noise of a step comes from: what the target asks for, what rounding adds, what Q^vc can deliver."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lpsgld.formats import FormatLike, NumberFormat, parse_format
from lightning_lpsgld.ops.crossing import HELD_FROM, crossing
from lightning_lpsgld.ops.reference import VariancePlan, power_of_two, variance_plan

__all__ = ["BudgetUpdate", "VarianceBudget", "rounding_variance_after_noise", "variance_budget"]

#: How a step is rounded, for its budget: Q^vc, noise and then stochastic rounding, or a full-precision sum.
BudgetUpdate = Literal["vc", "naive", "full"]

#: Above this noise (in gaps) the Fourier series has converged to 1e-9 with 8 terms; below, the folded normal is exact.
_SERIES_FROM = 0.1
_TERMS = 8


@dataclass(frozen=True)
class VarianceBudget:
    """Noise of one step of one tensor, against its target; all 0-d float64 tensors on the tensor's device.

    Attributes:
        high: Share of elements in Q^vc's large-variance regime (v > gap²/4): the target is met exactly.
        low: Share in the small-variance regime where the target is met too.
        unreachable: Share where rounding alone has more variance than the target.
        achieved: Mean variance delivered, squared weight units, with what the top of blocks adds (without clamping).
        target: Mean variance asked for.
        rounding: Mean variance of stochastic rounding of the mean, p(1−p)Δ².
        saturated: Share of means outside the range of the format.
        crossing: Share of the blocks that will take the next exponent, expected.
        carried: Mean variance that this adds, a part of ``achieved``.
        held: Share of the blocks with an element whose clamped codes have a mean that is off by more than a hundredth
            of its gap; of a format without blocks: of the elements.
        bias: Mean square of what the means are off by clamping, squared weight units.
    """

    high: Tensor
    low: Tensor
    unreachable: Tensor
    achieved: Tensor
    target: Tensor
    rounding: Tensor
    saturated: Tensor
    crossing: Tensor
    carried: Tensor
    held: Tensor
    bias: Tensor

    @property
    def ratio(self) -> Tensor:
        """Achieved over target; 1 where both are 0, infinite where only the target is."""
        both = (self.achieved == 0) & (self.target == 0)
        return torch.where(both, torch.ones_like(self.target), self.achieved / self.target)

    def effective_temperature(self, temperature: float) -> Tensor:
        """Temperature that Gaussian noise of the achieved power would have: ``temperature * ratio``."""
        return temperature * self.ratio


def rounding_variance_after_noise(scaled: Tensor, target: Tensor) -> Tensor:
    r"""Mean of p(1−p) when Gaussian noise is added before stochastic rounding; everything in units of the gap.

    .. math::
        E\,p(1-p) = \tfrac16 - \sum_{n \ge 1} \frac{\cos 2\pi n s}{\pi^2 n^2} e^{-2\pi^2 n^2 t}

    for noise of more than a tenth of a gap, and :math:`E|R| - E R^2` with R the noisy distance to the nearest grid
    point (a folded normal) below.

    Args:
        scaled: Means s = μ/Δ, float64, any shape.
        target: Noise variance t = v/Δ² >= 0, broadcasts to ``scaled``.

    Returns:
        Variance of the rounding in units of Δ², between 0 and 1/4; 1/6 for noise of half a gap and more.
    """
    sigma = target.sqrt()
    distance = (scaled - scaled.round()).abs()
    series = torch.full_like(scaled, 1.0 / 6.0)
    for n in range(1, _TERMS + 1):
        damping = torch.exp(-2.0 * (math.pi * n) ** 2 * target)
        series = series - torch.cos(2.0 * math.pi * n * distance) * damping / (math.pi * n) ** 2
    a = distance / sigma.clamp(min=1e-150)
    density = torch.exp(-0.5 * a * a) * math.sqrt(2.0 / math.pi)
    folded = sigma * density + distance * torch.erf(a / math.sqrt(2.0))
    return torch.where(sigma > _SERIES_FROM, series, (folded - distance**2 - target).clamp(min=0.0))


def _achieved(update: BudgetUpdate, plan: VariancePlan) -> Tensor:
    if update == "vc":
        return plan.achieved
    if update == "full":
        return plan.target
    return plan.target + rounding_variance_after_noise(plan.scaled, plan.target)


def _outside(mean: Tensor, fmt: NumberFormat, variance: float | Tensor) -> Tensor:
    low, high = fmt.value_limits(mean, variance)
    return (mean < low) | (mean > high)


def variance_budget(
    mean: Tensor, variance: float | Tensor, fmt: FormatLike, *, update: BudgetUpdate = "vc"
) -> VarianceBudget:
    r"""Predict, without a draw, what noise one step delivers.

    Args:
        mean: θ − ηg before rounding, any shape, floating dtype, weight units. Blocks of block formats are its blocks.
        variance: v = 2ηT/N >= 0 that the target asks for, squared weight units; broadcasts to ``mean``.
        fmt: Format of the weight.
        update: ``"vc"``: Q^vc, delivers max(v, p(1−p)Δ²). ``"naive"``: noise and then stochastic rounding, delivers
            v + E p(1−p)Δ². Both deliver more where a block takes the next exponent, which is counted exactly.
            ``"full"``: a full-precision accumulator, delivers v; what the forward pass sees is rounded but not
            accumulated.

    Returns:
        Shares of the regimes and mean variances. The regimes are Q^vc's whatever the update: where it could help.

    Raises:
        ValueError: If ``update`` is unknown or a variance is negative.

    Example:
        >>> import torch
        >>> budget = variance_budget(torch.linspace(-1, 1, 100), 1e-3, "fixed8.3")
        >>> round(float(budget.unreachable), 2), bool(budget.ratio > 2)
        (0.86, True)

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, section 4; the regime that it calls rare is most of a network.
    """
    number = parse_format(fmt)
    if update not in get_args(BudgetUpdate):
        raise ValueError(f"`update` must be one of {get_args(BudgetUpdate)}, got {update!r}.")
    if not bool((torch.as_tensor(variance) >= 0).all()):
        raise ValueError(f"`variance` must be >= 0 everywhere, got {variance}.")
    plan = variance_plan(mean.detach(), variance, number)
    square = power_of_two(plan.gap_exponents) ** 2
    count = max(mean.numel(), 1)
    top = crossing(plan, number, mean.dtype, update="naive" if update == "naive" else "vc")
    if update == "full":
        top = replace(top, added=torch.zeros_like(top.added), bias=torch.zeros_like(top.bias))

    def share(mask: Tensor) -> Tensor:
        return mask.double().sum() / count

    def average(units: Tensor) -> Tensor:
        return (units * square).sum() / count

    held = (top.bias.abs() > HELD_FROM).double()
    return VarianceBudget(
        high=share(plan.high),
        low=share(~plan.high & ~plan.unreachable),
        unreachable=share(plan.unreachable),
        achieved=average(_achieved(update, plan) + top.added),
        target=average(plan.target),
        rounding=average(plan.rounding),
        saturated=share(_outside(mean, number, variance if update == "vc" else 0.0)),
        crossing=_mean_of(top.probability),
        carried=average(top.added),
        held=_mean_of(number.blocks.max(held)),
        bias=average(top.bias**2),
    )


def _mean_of(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)
