r"""A walk between neighbouring grid points that has the target's law on the grid: no Gaussian, no rounding error.

One step of a coordinate θ with mean step ``drift`` m = −ηg and noise variance v = 2ηT/N (so that the slope of the
target's exponent, in units of a gap, is :math:`x = \Delta\,\partial U = -2\Delta m/v`) proposes a length j of 1 to J
gaps, and goes up or down by it with probabilities

.. math::
    p_\pm(j) = \tfrac{A}{2}\, f(\pm j,\, y), \qquad y = \Delta m/v = -x/2, \qquad
    A\,\tfrac{(J+1)(2J+1)}{6} = v/\Delta^2, \quad A \le \tfrac12

else it stays. J = 1 wherever :math:`v \le \Delta^2/2`: then A/2 is the :math:`v/2\Delta^2` of a plain random walk.

=================  ==========================  ====================================================================
rates              f(±1, y)                    law on the grid for a slope that is linear in θ, and mean step
=================  ==========================  ====================================================================
``"exponential"``  exp(±y)                     exp(−U), exactly; mean step (v/Δ) sinh(y), more than m
``"bernoulli"``    ±2y / (1 − exp(∓2y))        exp(−U) averaged over a cell (up to curvature); mean step m, exactly
``"linear"``       max(0, 1 ± y), 2|y| beyond  second moment max(v, Δ|m|): what Q^vc does; mean step m, exactly
``"heat-bath"``    2 / (1 + exp(∓2y))          exp(−U) cosh(y): the variance is larger by Δ²/4; never above 1
=================  ==========================  ====================================================================

With minibatch gradients of noise s, a standard deviation σ = Δηs/v of y, both odds of ``"exponential"`` grow by
exp(j²σ²/2); told s, the walk divides that out again.

``"exponential"`` is the walk for exact gradients. ``"bernoulli"`` (exponential fitting, Scharfetter-Gummel) is linear
in the gradient where the gradient is large, so it survives the noise of minibatches, and turns into the stochastic
rounding of SGDLP-L where the temperature is too low for the grid. The derivations are in ``docs/theory.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import (
    FixedPoint,
    FormatLike,
    NumberFormat,
    check_dtype,
    parse_format,
)
from lightning_lpsgld.ops import reference
from lightning_lpsgld.ops.carry import carry_key
from lightning_lpsgld.random import DrawKey, words

__all__ = ["RATES", "Rates", "WalkPlan", "jump_odds", "lattice_step", "walk_law", "walk_plan"]

#: Odds of the walk's jumps; see the table above.
Rates = Literal["exponential", "bernoulli", "linear", "heat-bath"]
#: The values of :data:`Rates`.
RATES: tuple[Rates, ...] = ("exponential", "bernoulli", "linear", "heat-bath")

#: exp() of more than this overflows float64; odds are capped at 1 long before.
_LOG_MAX = 600.0
#: Steeper slopes count as this steep, so that no difference of two of them is that of infinities.
_SLOPE_MAX = 1e150


@dataclass(frozen=True)
class WalkPlan:
    """How the walk will treat every element: all that is decided before a draw; float64, broadcast to the weight.

    Attributes:
        codes: Current codes k (the weight in gaps).
        gap_exponents: log2 of the gap.
        reach: J, the longest jump.
        clock: A, twice the probability of a jump of each length on a flat target.
        slope: y = Δm/v, half the log of the odds between up and down; 0 where v = 0.
        bend: κ = Δ²·curvature/v, half the target's log-curvature over one gap; of the shape of the weight.
        blur: σ, the standard deviation of the slope that gradient noise causes; of the shape of the weight.
        step: m/Δ, the mean step in gaps.
        target: v/Δ², the variance in squared gaps.
        rates: Which f.
    """

    codes: Tensor
    gap_exponents: Tensor
    reach: Tensor
    clock: Tensor
    slope: Tensor
    bend: Tensor
    blur: Tensor
    step: Tensor
    target: Tensor
    rates: Rates

    @property
    def ballistic(self) -> Tensor:
        """Elements whose mean step is more than the walk can carry: they take Q^vc instead.

        For the rates whose mean step is m this is a sum of the odds above 1; for the others a step beyond J gaps.
        """
        if self.rates in ("bernoulli", "linear"):
            up, down = _odds(self, torch.ones_like(self.codes))
            return up + down > 1.0
        return self.step.abs() > self.reach

    @property
    def capped(self) -> Tensor:
        """Elements whose odds of a longest jump had to be scaled down to 1: there the law on the grid is bent."""
        up, down = _odds(self, self.reach)
        return ~self.ballistic & (up + down > 1.0)


def _reach(target: Tensor) -> Tensor:
    """Smallest J with v/gap**2 <= (J+1)(2J+1)/12, so that half of the proposals are refused on a flat target."""
    root = ((1.0 + 96.0 * target).sqrt() - 3.0) / 4.0
    return root.ceil().clamp(min=1.0)


def walk_plan(
    theta: Tensor,
    drift: Tensor,
    variance: float | Tensor,
    fmt: NumberFormat,
    *,
    rates: Rates = "exponential",
    curvature: float | Tensor = 0.0,
    gradient_std: float | Tensor = 0.0,
) -> WalkPlan:
    """Decide gap, jump lengths and odds of every element; arguments as :func:`lattice_step`, ``theta`` on the grid."""
    if rates != "exponential" and (isinstance(gradient_std, Tensor) or gradient_std != 0):
        raise ValueError(
            f"`gradient_std` is for rates='exponential', whose odds gradient noise multiplies; got rates={rates!r}, "
            "whose mean step it does not change. Leave it at 0."
        )
    wide, drift = theta.double(), drift.double()

    def wanted(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=theta.device).expand(theta.shape)

    spread, bending, noise = wanted(variance), wanted(curvature).clamp(min=0.0), wanted(gradient_std)
    gap_exponents = fmt.gap_exponents(wide, fmt.exponents(wide, theta.dtype))
    inverse = reference.power_of_two(-gap_exponents)
    step, target = drift * inverse, spread * inverse * inverse
    safe = torch.where(target > 0, target, torch.ones_like(target))
    slope = torch.where(target > 0, step / safe, torch.zeros_like(step))
    bend = torch.where(target > 0, bending / safe, torch.zeros_like(step))
    blur = torch.where(target > 0, (noise * inverse / safe).clamp(0.0, _SLOPE_MAX), torch.zeros_like(step))
    reach = _reach(target)
    clock = 6.0 * target / ((reach + 1.0) * (2.0 * reach + 1.0))
    if rates == "exponential":  # slow enough that the odds one gap from the mode still fit under 1
        clock = torch.minimum(clock, 1.0 / torch.cosh(bend.clamp(max=_LOG_MAX)))
    return WalkPlan(wide * inverse, gap_exponents, reach, clock, slope, bend, blur, step, target, rates)


def _cell(y: Tensor, bend: Tensor) -> Tensor:
    r""":math:`I(y) = \int_0^1 e^{-2yr - \kappa(1/2 - r)^2} dr` for y >= 0, the mass of a cell over its upper end's."""
    straight = torch.where(y > 1e-8, -torch.expm1(-2.0 * y) / (2.0 * y).clamp(min=1e-300), torch.ones_like(y))
    root = bend.clamp(min=1e-8).sqrt()
    low, high = y / root - root / 2, y / root + root / 2
    inside = torch.exp((y * y / root**2 - y).clamp(-_LOG_MAX, 0.0)) * (torch.erf(high) + torch.erf(-low))
    tail = torch.special.erfcx(low.clamp(min=0.0)) - torch.exp(-2.0 * y) * torch.special.erfcx(high)
    bent = torch.pi**0.5 / 2 / root * torch.where(low < 0, inside, torch.exp(-(bend / 4).clamp(max=_LOG_MAX)) * tail)
    return torch.where(bend > 1e-8, bent, straight)


def _factor(plan: WalkPlan, length: Tensor) -> tuple[Tensor, Tensor]:
    """f(+length, y) and f(-length, y)."""
    y = plan.slope.abs()
    if plan.rates == "exponential":
        y, penalty = y.clamp(max=_SLOPE_MAX), (length * plan.blur) ** 2 / 2
        along, against = torch.exp((length * y - penalty).clamp(max=_LOG_MAX)), torch.exp(-length * y - penalty)
    elif plan.rates == "heat-bath":
        along, against = 1.0 + torch.tanh(length * y), 1.0 - torch.tanh(length * y)
    elif plan.rates == "linear":
        along = torch.where(length * y < 1.0, 1.0 + length * y, 2.0 * length * y)
        against = (1.0 - length * y).clamp(min=0.0)
    else:
        cell = _cell(y, plan.bend)
        along = torch.exp(((length - 1.0) * y).clamp(max=_LOG_MAX)) / cell
        against = torch.exp(-(length + 1.0) * y) / cell
    up = plan.slope >= 0
    return torch.where(up, along, against), torch.where(up, against, along)


def _odds(plan: WalkPlan, length: Tensor) -> tuple[Tensor, Tensor]:
    """Odds of going up and down by ``length`` gaps before they are capped; those of rounding where v = 0."""
    up, down = _factor(plan, length)
    frozen = plan.target == 0
    up = torch.where(frozen, plan.step.clamp(min=0.0), plan.clock / 2 * up)
    return up, torch.where(frozen, (-plan.step).clamp(min=0.0), plan.clock / 2 * down)


def jump_odds(plan: WalkPlan, length: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of going up and down when a jump of ``length`` gaps is proposed; their sum is at most 1.

    Args:
        plan: Of :func:`walk_plan`.
        length: 1 to J, float64, broadcasts to the weight.

    Returns:
        Two tensors. Where the odds add up to more than 1 they are divided by their sum.
    """
    up, down = _odds(plan, length)
    total = (up + down).clamp(min=1.0)
    return up / total, down / total


def _checked(theta: Tensor, fmt: FormatLike, rates: str) -> NumberFormat:
    number = parse_format(fmt)
    check_dtype(number, theta.dtype)
    if not number.linear:
        raise ValueError(
            f"The lattice walk needs equal gaps up and down, which {number} has not at powers of two. Use a "
            f"fixed-point or block format, or the variance-corrected quantizer."
        )
    if rates not in RATES:
        raise ValueError(f"`rates` must be one of {RATES}, got {rates!r}.")
    return number


def _refuse_negative(**values: float | Tensor) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            continue
        if not bool((torch.as_tensor(value) >= 0).all()):
            raise ValueError(f"`{name}` must be >= 0 everywhere, got {value}.")


def lattice_step(
    theta: Tensor,
    drift: Tensor,
    variance: float | Tensor,
    fmt: FormatLike,
    *,
    key: DrawKey,
    rates: Rates = "exponential",
    curvature: float | Tensor = 0.0,
    gradient_std: float | Tensor = 0.0,
) -> Tensor:
    r"""One step of the lattice walk: jump by whole gaps, with odds that keep the target's law on the grid.

    Detailed balance: with exact gradients :math:`p_+(\theta)/p_-(\theta + \Delta) = \exp(-\Delta (g + g')/2T)`, the
    trapezoid rule for the difference of the target's exponent. So ``"exponential"`` keeps
    :math:`P(\theta_k) \propto \exp(-U(\theta_k)/T)` exactly where the gradient is linear, for *every* step size, and up
    to :math:`\Delta^2 U''/12T` in the exponent elsewhere.

    **Where the promise stops.** (1) Odds of more than 1 (a gap that the target cannot resolve together with a large
    step) are scaled to 1: such elements are ``walk_plan(...).capped``; told the ``curvature``, ``"exponential"`` slows
    its clock instead. (2) A mean step too large for jumps (``.ballistic``) is taken by
    :func:`~lightning_lpsgld.ops.quantize_variance_corrected`. (3) Minibatch noise of standard deviation s multiplies
    both odds of ``"exponential"`` by :math:`\exp(\Delta^2 s^2/8T^2)`: harmless where it is the same everywhere and
    small; where it changes with θ, ``gradient_std`` takes it out again, exactly for Gaussian noise as far as odds stay
    below 1. Beyond :math:`\Delta s/2T` of about 2 rare large odds carry the mean and are cut off, with or without the
    remedy, and :math:`\Delta s \gg T` (deep nets) is out of reach: use ``"bernoulli"`` or Q^vc there. (4) Block
    formats: the gap is the one of the block's present exponent. A jump that raises the exponent rounds the block's odd
    codes stochastically (mean exact), one that lowers it makes the gap finer; neither keeps detailed balance.

    Args:
        theta: θ, any shape, floating dtype; on the grid (what is not, is rounded stochastically first). Not modified.
        drift: m = −ηg, the mean step wanted, shape of ``theta``, weight units.
        variance: v = 2ηT/N >= 0, a float or a tensor that broadcasts to ``theta``, squared weight units. With 0 the
            step is stochastic rounding of θ + m.
        fmt: Fixed-point or block format.
        key: Names the draws.
        rates: See the table of this module.
        curvature: η·∂²U >= 0, how much the mean step shrinks per unit of θ (a Gauss-Newton diagonal, say); float or
            tensor. With it ``"bernoulli"`` keeps the target's mass per cell exactly on a quadratic (the best law on the
            grid in W2), and ``"exponential"`` chooses a clock that is never capped next to the mode. 0: unknown.
        gradient_std: η·s >= 0, standard deviation of the noise in ``drift``, weight units; float or tensor, of
            ``"exponential"`` only. Both odds of a jump of j gaps are divided by :math:`\exp(j^2\sigma^2/2)`, σ the
            standard deviation of y (the penalty method). It should be known, or estimated from other batches: an
            estimate from the same one is as noisy as the batch is small. 0: gradients are exact.

    Returns:
        Tensor of the shape and dtype of ``theta``, on the grid. Jumps that leave the range are not made.

    Raises:
        ValueError: If ``rates`` is unknown, ``variance`` or ``gradient_std`` is negative or NaN (tensors on an
            accelerator are not looked at, which would synchronise; no jump is made there), shapes differ, ``fmt`` has
            gaps that change from value to value, or ``gradient_std`` is given with other rates.

    Example:
        >>> import torch
        >>> theta = torch.zeros(100_000)
        >>> new = lattice_step(theta, torch.full_like(theta, 1e-3), 1e-3, "fixed8.3", key=DrawKey(seed=0))
        >>> sorted(set(new.tolist()))
        [-0.125, 0.0, 0.125]

    Reference:
        Locally balanced jumps: Zanella, 2017, arXiv:1711.07424; penalty: Ceperley & Dewing, 1999, J. Chem. Phys. 110;
        exponential fitting: Scharfetter & Gummel, 1969, IEEE Trans. Electron Devices 16. Compare "Stochastic gradient
        lattice random walk", arXiv:2602.15925.
    """
    number = _checked(theta, fmt, rates)
    if drift.shape != theta.shape:
        raise ValueError(f"`drift` must have the shape of `theta`, {tuple(theta.shape)}, got {tuple(drift.shape)}.")
    _refuse_negative(variance=variance, gradient_std=gradient_std)
    theta = reference.quantize(theta.detach(), number, "stochastic", key)
    plan = walk_plan(
        theta, drift.detach(), variance, number, rates=rates, curvature=curvature, gradient_std=gradient_std
    )
    gap = reference.power_of_two(plan.gap_exponents)
    new = (_moved(plan, number, key) * gap + 0.0).to(theta.dtype)
    if theta.device.type != "cpu" or bool(plan.ballistic.any()):  # elsewhere than on a CPU, to look would synchronise
        leapt = reference.quantize_variance_corrected(theta + drift.to(theta.dtype), variance, number, key)
        new = torch.where(plan.ballistic, leapt, new)
    if not number.blocks.shared:
        return new
    return reference.quantize(new, number, "stochastic", carry_key(key))  # the grid of the exponents that it now has


def _moved(plan: WalkPlan, fmt: NumberFormat, key: DrawKey) -> Tensor:
    """Codes after the jump; one 32-bit word gives both the length and the decision."""
    draw = (words(plan.codes.shape, key, device=plan.codes.device).double() + 0.5) * 2.0**-32 * plan.reach
    length = draw.floor() + 1.0
    up, down = jump_odds(plan, length)
    decision = draw - draw.floor()
    moved = plan.codes + length * ((decision >= 1.0 - up).double() - (decision < down).double())
    if fmt.blocks.shared:
        return moved
    low, high = fmt.code_range
    return torch.where((moved < low) | (moved > high), plan.codes, moved)


def walk_law(
    theta: Tensor,
    drift: Tensor,
    variance: float,
    fmt: FixedPoint,
    *,
    rates: Rates = "exponential",
    curvature: float = 0.0,
    gradient_std: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor, WalkPlan]:
    """Exact law of one step: the new codes, their probabilities, and the plan (whose ballistic elements are Q^vc's).

    Args:
        theta: Values on the grid, float64, shape ``(M,)``.
        drift: Mean steps, shape ``(M,)``.
        variance: v.
        fmt: Fixed-point format.
        rates: As :func:`lattice_step`.
        curvature: As :func:`lattice_step`.
        gradient_std: As :func:`lattice_step`: what the walk is told. The law is that for the ``drift`` given.

    Returns:
        Codes and probabilities, float64, shape ``(M, 2J + 1)``, a code may occur more than once; and the plan.
    """
    plan = walk_plan(theta, drift, variance, fmt, rates=rates, curvature=curvature, gradient_std=gradient_std)
    codes, masses = [], []
    for j in range(1, int(plan.reach.max()) + 1):
        length = torch.full_like(plan.codes, j)
        up, down = (torch.where(length <= plan.reach, odds, 0.0) / plan.reach for odds in jump_odds(plan, length))
        for target, mass in ((plan.codes + j, up), (plan.codes - j, down)):
            inside = (target >= fmt.code_min) & (target <= fmt.code_max)
            codes.append(torch.where(inside, target, plan.codes))
            masses.append(torch.where(inside, mass, 0.0))
    stay = (1.0 - torch.stack(masses, dim=-1).sum(-1)).clamp(min=0.0)
    return torch.stack([*codes, plan.codes], dim=-1), torch.stack([*masses, stay], dim=-1), plan
