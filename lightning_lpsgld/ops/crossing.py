r"""What the top of a block does to a rounding, exactly: how likely the next exponent is, and what it costs.

Given its law before (:class:`.VariancePlan`), the code :math:`k_j` of an element after j halvings (:mod:`.carry`) is
:math:`\lfloor (k + b)/2^j \rfloor` with b uniform on j bits. A block is halved once more while a code passes the top t;
elements are independent, so

.. math::
    P(\text{level} > j) = 1 - \prod_i P(|k_{i,j}| \le t), \qquad
    \mathrm{Var}\,k'_i = \mathrm{Var}\,k_i + \sum_j 4^j P(\text{level} > j,\ k_{i,j} \text{ odd})

because each halving moves an odd code by one of its gaps, either way by a coin of its own. Where codes are clamped
instead (published rule, ends of a range), nothing is added, and the mean is off by :math:`E[\mathrm{clamp}(k)] - s`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.formats.exponents import BOUNDLESS, NOISE_REACH
from lightning_lpsgld.ops.reference import VariancePlan
from lightning_lpsgld.ops.splines import four_points, spline_masses, upper_moment

__all__ = ["HELD_FROM", "Crossing", "crossing"]

Update = Literal["vc", "naive"]

#: An element is said to be held by a clamp if its mean is off by more than this share of its gap.
HELD_FROM = 0.01

#: Noise of more gaps is taken for what it is: Gaussian, with odd and even codes equally likely (off by e^-1000).
_WIDE = 16.0
_NEGLIGIBLE, _MOST_LEVELS = 1e-15, 62


@dataclass(frozen=True)
class Crossing:
    """What happens at the top of the blocks of a tensor; everything float64.

    Attributes:
        probability: Of each block, to take the next exponent; compact shape. 0 of formats without blocks.
        added: Variance that this adds to each element, in units of its gap (before) squared.
        bias: Mean of each element less what was asked for, in units of its gap: 0 unless codes are clamped.
    """

    probability: Tensor
    added: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Elements:
    """Some elements, flat: their laws before the top is looked at. ``laws`` are (positions, codes, masses)."""

    laws: list[tuple[Tensor, Tensor, Tensor]]
    wide: Tensor
    scaled: Tensor
    sigma: Tensor
    top: Tensor

    def at(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """After ``level`` halvings: P(beyond the top), P(odd), P(odd and not beyond)."""
        out, odd, inner = (torch.zeros_like(self.scaled) for _ in range(3))
        for at, codes, masses in self.laws:
            found = _halved(codes, masses, level, self.top[at, None])
            for total, part in zip((out, odd, inner), found):
                total[at] = part
        if self.wide.numel():
            s, sigma, top = self.scaled[self.wide], self.sigma[self.wide], self.top[self.wide]
            beyond = (_rounds_past(s, sigma, top, level) + _rounds_past(-s, sigma, top, level)).clamp(max=1.0)
            out[self.wide], odd[self.wide], inner[self.wide] = beyond, 0.5, (1.0 - beyond) / 2
        return out, odd, inner

    def clamped_mean(self, low: Tensor, high: Tensor) -> Tensor:
        """E[clamp(k)] - s."""
        bias = torch.zeros_like(self.scaled)
        for at, codes, masses in self.laws:
            kept = torch.minimum(torch.maximum(codes, low[at, None]), high[at, None])
            bias[at] = ((kept - codes) * masses).sum(1)
        if self.wide.numel():
            s, sigma = self.scaled[self.wide], self.sigma[self.wide]
            over = upper_moment(high[self.wide] - s, sigma, 1)
            bias[self.wide] = upper_moment(s - low[self.wide], sigma, 1) - over
        return bias


def _halved(codes: Tensor, masses: Tensor, level: int, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    whole = codes.long()
    lower, up = (whole >> level).double(), (whole & ((1 << level) - 1)).double() / (1 << level)
    low_in, up_in = (lower.abs() <= top).double(), ((lower + 1).abs() <= top).double()
    odd_is_low = (lower.long() & 1).bool()
    odd, inner = torch.where(odd_is_low, 1 - up, up), torch.where(odd_is_low, (1 - up) * low_in, up * up_in)
    outside = (1 - up) * (1 - low_in) + up * (1 - up_in)
    return (masses * outside).sum(1), (masses * odd).sum(1), (masses * inner).sum(1)


def _rounds_past(s: Tensor, sigma: Tensor, top: Tensor, level: int) -> Tensor:
    """P(a Gaussian, rounded stochastically onto the gap 2^level, is more than ``top`` of them)."""
    gap = float(1 << level)
    return (upper_moment(top * gap - s, sigma, 1) - upper_moment((top + 1) * gap - s, sigma, 1)) / gap


def _elements(plan: VariancePlan, at: Tensor, top: Tensor, update: Update) -> _Elements:
    """Laws of the elements at flat indices ``at``."""
    shape = plan.scaled.shape
    scaled, target, corrective = (x.expand(shape).flatten()[at] for x in (plan.scaled, plan.target, plan.corrective))
    gaussian = plan.gaussian.expand(shape).flatten()[at] if update == "vc" else target > 0
    sigma = torch.where(gaussian, target, 0.0).sqrt()
    wide = sigma > _WIDE
    positions = torch.arange(len(at), device=at.device)
    laws = []
    near, noisy = positions[~gaussian], positions[gaussian & ~wide]
    if near.numel():
        given = corrective[near] if update == "vc" else torch.zeros_like(scaled[near])
        laws.append((near, *four_points(scaled[near], given)))
    if noisy.numel():
        spread = target[noisy] - (0.25 if update == "vc" else 0.0)
        laws.append((noisy, *spline_masses(scaled[noisy], spread.clamp(min=0.0), 3 if update == "vc" else 2)))
    return _Elements(laws, positions[wide], scaled, sigma, top)


def _clamping(plan: VariancePlan, reach: Tensor, update: Update) -> Tensor:
    """Bias of elements that may be clamped, in their gaps."""
    shape, bias = plan.scaled.shape, torch.zeros_like(plan.scaled)
    low, high = plan.low_code.expand(shape), plan.high_code.expand(shape)
    at = ((plan.scaled + reach > high) | (plan.scaled - reach < low)).flatten().nonzero()[:, 0]
    if at.numel():
        low, high = low.flatten()[at], high.flatten()[at]
        bias.view(-1)[at] = _elements(plan, at, high, update).clamped_mean(low, high)
    return bias


def crossing(plan: VariancePlan, fmt: NumberFormat, dtype: torch.dtype, *, update: Update = "vc") -> Crossing:
    """Exact probabilities and variances of what a plan leaves to chance at the top of blocks.

    Args:
        plan: Of a tensor in ``fmt``. With a target variance of 0 both updates are stochastic rounding alone.
        fmt: The format that the plan is for.
        dtype: dtype of the result, which bounds the exponents.
        update: ``"vc"``: codes are those of Q^vc. ``"naive"``: Gaussian noise, then stochastic rounding; blocks that
            the noise takes below their exponent are counted with the gap of the mean.

    Returns:
        A :class:`Crossing`. Noise of more than 16 gaps (one block with very different variances) is taken as Gaussian.

    Note:
        Of scaled floats only the values next to zero have a coarser gap under a larger scale, and one doubling is
        followed.

    Example:
        >>> from lightning_lpsgld.formats import parse_format
        >>> from lightning_lpsgld.ops.reference import variance_plan
        >>> x, fmt = torch.tensor([[127.25 / 64, 3 / 64, 0.5 / 64]]), parse_format("bfp8")
        >>> found = crossing(variance_plan(x, 0.0, fmt), fmt, torch.float32)
        >>> found.probability, found.added  # 128 is even: no coin is thrown for the largest
        (tensor([0.2500], dtype=torch.float64), tensor([[0.0000, 0.2500, 0.1250]], dtype=torch.float64))
    """
    shape = plan.scaled.shape
    finite = plan.scaled.isfinite()
    noise = torch.where(plan.gaussian if update == "vc" else plan.target > 0, plan.target, 0.0)
    reach = torch.where(finite, NOISE_REACH * noise.sqrt() + 2.0, -BOUNDLESS).expand(shape)
    bias = _clamping(plan, reach, update)
    added = torch.zeros_like(bias)
    if not fmt.blocks.shared:
        return Crossing(bias.new_zeros(()), added, bias)
    compact = fmt.blocks.compact(shape)
    probability = bias.new_zeros(compact)
    top, room, coarser = fmt.doublings(plan.scaled, plan.gap_exponents, plan.scales, dtype)
    near = fmt.blocks.max(((plan.scaled.abs() + reach > top) & (room > 0)).double()) > 0
    at = (fmt.blocks.expand(near, shape).expand(shape) & finite).flatten().nonzero()[:, 0]
    if at.numel():
        count = math.prod(compact)
        numbers = torch.arange(count, device=bias.device).reshape(compact)
        block = fmt.blocks.expand(numbers, shape).expand(shape).flatten()[at]
        elements = _elements(plan, at, top.flatten()[at], update)
        found, more = _follow(elements, block, room.flatten()[at], count)
        added.view(-1)[at] = more * coarser.flatten()[at]
        probability = found.reshape(compact)
    return Crossing(probability, added, bias)


def _follow(elements: _Elements, block: Tensor, room: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Probability of the first doubling per block, and added variance per element over all of them."""
    first, added = elements.scaled.new_zeros(count), torch.zeros_like(elements.scaled)
    for level in range(_MOST_LEVELS):
        out, odd, inner = elements.at(level)
        sure = (out >= 1.0).double()
        log = torch.log1p(-out.clamp(max=1.0 - 2.0**-53) * (1 - sure))
        total = first.new_zeros(count).index_add_(0, block, log)
        certain = first.new_zeros(count).index_add_(0, block, sure)
        others = (total[block] - log).exp() * (certain[block] - sure < 0.5)
        live = (level < room).double()
        added += live * 4.0**level * (odd - inner * others).clamp(min=0.0)
        crossed = torch.where(certain > 0.5, 1.0, -torch.expm1(total)).abs()  # no negative zero
        if level == 0:
            first = crossed
        if not bool((crossed[block] * live > _NEGLIGIBLE).any()):
            break
    return first, added
