"""What one step does to a tensor's noise: the numbers behind the effective-temperature meter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import StepSpec, quantize
from lightning_lpsgld.ops.crossing import HELD_FROM, crossing
from lightning_lpsgld.ops.lattice import jump_odds, lattice_step, walk_plan
from lightning_lpsgld.ops.reference import VariancePlan, power_of_two, quantize_variance_corrected, variance_plan
from lightning_lpsgld.ops.spec import Accumulation
from lightning_lpsgld.ops.tops import at_top
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id
from lightning_lpsgld.samplers.updates import count_saturated, descend

__all__ = ["Measurement", "StepStatistics", "rounding_statistics", "rounding_variance", "same_rows", "step_statistics"]


@dataclass(frozen=True)
class StepStatistics:
    r"""Noise of one step of one tensor, measured on ``count`` of its elements.

    Attributes:
        name: Name of the parameter.
        numel: Elements of the tensor.
        count: Elements measured.
        target: v, the noise variance asked for (mean, where it differs between elements; of the position, for SGHMC).
        achieved: Mean variance of the new weight (of the accumulator, where there is one) given the gradient.
        gradient_rounding: Mean variance that the gradient's rounding adds, :math:`\eta^2 p(1-p)\Delta_G^2`.
        view_rounding: Mean variance of the weight around its full accumulator; 0 without one.
        high: Share of elements with v > Δ²/4: reached whatever the mean.
        low: Share with v <= Δ²/4 and v reachable.
        unreachable: Share where rounding alone has more variance than v.
        saturated: Share outside the range of the weight format.
        unchanged: Share that this step leaves exactly where it was.
        effective_temperature: Temperature at which the achieved noise would be right; NaN for a step of size 0.
        velocity_target: Noise variance asked for of the velocity; 0 where there is none.
        velocity_achieved: That of the velocity given the gradient, the position's part included.
        blocks: Blocks among the elements measured; 0 of a format without, and where an accumulator is kept.
        crossing: Share of the blocks that this step takes to the next exponent, expected; what that adds is in
            ``achieved``.
        at_top: Share of the blocks whose largest code, after the step, is the last one below a power of two.
        held: Share of the blocks with an element whose mean is off by clamping by more than a hundredth of its gap.
        bias: Mean square of what means are off by clamping, squared weight units.
        minibatch: Mean variance that the noise of the mini-batch gradient adds, half the mean squared difference to the
            step before; NaN where its gradient was not kept. The weights' move in between counts in. Of SGHMC: times
            the target over that of a slow direction in the long run.
    """

    name: str
    numel: int
    count: int
    target: float
    achieved: float
    gradient_rounding: float
    view_rounding: float
    high: float
    low: float
    unreachable: float
    saturated: float
    unchanged: float
    effective_temperature: float = math.nan
    velocity_target: float = 0.0
    velocity_achieved: float = 0.0
    blocks: int = 0
    crossing: float = 0.0
    at_top: float = 0.0
    held: float = 0.0
    bias: float = 0.0
    minibatch: float = math.nan


@dataclass(frozen=True)
class Measurement:
    """Which step of which tensor is measured, and on how many of its elements.

    Attributes:
        name: Name of the parameter.
        key: Seed and step.
        index: Number of the tensor among the sampler's parameters.
        max_elements: Larger tensors are measured on a subset.
        per_temperature: Noise variance of a weight that T = 1 would ask for, 2η/N.
        previous: Gradient of the step before on the same elements, if it was kept.
    """

    name: str
    key: DrawKey
    index: int
    max_elements: int
    per_temperature: float
    previous: Tensor | None = None

    def gradient_variance(self, grad: Tensor, factor: Tensor | float = 1.0) -> float:
        """Variance of the mini-batch gradient times ``factor`` (one or per element), mean; NaN where unknown."""
        if self.previous is None or self.previous.shape != grad.shape:
            return math.nan
        return float(((grad.double() - self.previous.double()).square() * factor / 2).mean())

    def stream(self, role: Role) -> DrawKey:
        """Key of the tensor's draws for one purpose."""
        return self.key.at(stream=stream_id(role, self.index))

    def temperature(self, achieved: float, scale: float = 1.0) -> float:
        """That of noise of variance ``achieved``, where T = 1 asks for ``per_temperature * scale``."""
        return achieved / (self.per_temperature * scale) if self.per_temperature > 0 else math.nan


def _subset(x: Tensor, max_elements: int) -> Tensor:
    if x.numel() <= max_elements or x.ndim == 0:
        return x
    keep = max(1, x.shape[0] * max_elements // x.numel())
    return x[torch.linspace(0, x.shape[0] - 1, keep, device=x.device).long()]


def same_rows(tensors: Sequence[Tensor], formats: Sequence[NumberFormat | None], max_elements: int) -> list[Tensor]:
    """Evenly spaced indices of dim 0 of tensors of one shape; all of them where blocks of a format run across rows."""
    if any(fmt is not None and fmt.blocks.crosses_rows(x.ndim) for x in tensors for fmt in formats):
        return list(tensors)
    return [_subset(x, max_elements) for x in tensors]


def rounding_variance(x: Tensor, fmt: NumberFormat) -> Tensor:
    """p(1-p)gap**2 of stochastic rounding, and what the next exponent of a block adds; float64."""
    plan = variance_plan(x, 0.0, fmt)
    return (plan.rounding + crossing(plan, fmt, x.dtype).added) * power_of_two(plan.gap_exponents) ** 2


def _tops(plan: VariancePlan, new: Tensor, fmt: NumberFormat) -> tuple[Tensor, dict[str, Any]]:
    """Variance that the top of blocks adds, squared weight units, and what a step says about them."""
    top, square = crossing(plan, fmt, new.dtype), power_of_two(plan.gap_exponents) ** 2
    held = (top.bias.abs() > HELD_FROM).double()
    facts = {"bias": float((top.bias**2 * square).mean())}
    if fmt.blocks.shared:
        count = max(top.probability.numel(), 1)
        facts.update(crossing=float(top.probability.sum()) / count, held=float(fmt.blocks.max(held).sum()) / count)
    return top.added * square, {**facts, **_standing(new, fmt)}


def _standing(new: Tensor, fmt: NumberFormat) -> dict[str, Any]:
    standing = at_top(new, fmt)
    count = standing.numel()
    return {"blocks": count, "at_top": float(standing.double().sum()) / max(count, 1)}


def step_statistics(theta: Tensor, grad: Tensor, spec: StepSpec, what: Measurement) -> StepStatistics:
    """Measure what a step with ``spec`` will do to ``theta``, before it is done.

    Variances are exact given the gradient (for naive rounding: given the noise of one draw). The share ``unchanged`` is
    from one draw; with all elements measured it is the draw that the step will make.

    Args:
        theta: Weight, or its accumulator where there is one.
        grad: Gradient of the batch-mean loss.
        spec: The step.
        what: Whose step, which, and how much of it.

    Returns:
        The statistics.
    """
    numel, noise = theta.numel(), torch.as_tensor(spec.gradient_std, device=theta.device).expand_as(theta)
    formats = (spec.weight_format, spec.gradient_format)
    theta, grad, noise = same_rows((theta, grad, noise), formats, what.max_elements)
    gradient_rounding, minibatch = 0.0, what.gradient_variance(grad, spec.lr**2)
    if spec.gradient_format is not None:
        gradient_rounding = spec.lr**2 * float(rounding_variance(grad, spec.gradient_format).mean())
        grad = quantize(grad, spec.gradient_format, key=what.stream(Role.GRADIENT))
    mean = descend(theta, grad.to(theta.dtype), lr=spec.lr, weight_decay=spec.weight_decay)
    if spec.accumulation == "lattice":
        told = noise if isinstance(spec.gradient_std, Tensor) else spec.gradient_std
        found = _describe_walk(theta, mean, replace(spec, gradient_std=told), what)
    else:
        found = rounding_statistics(theta, mean, spec.noise_variance, spec.weight_format, spec.accumulation, what)
    return replace(found, numel=numel, gradient_rounding=gradient_rounding, minibatch=minibatch)


def rounding_statistics(
    theta: Tensor,
    mean: Tensor,
    variance: float | Tensor,
    fmt: NumberFormat | None,
    accumulation: Accumulation,
    what: Measurement,
) -> StepStatistics:
    """Noise and rounding of a step to ``mean`` with ``variance``, a float or one per element; not the lattice walk's.

    Of the gradient's rounding it knows nothing, and ``numel`` is the number of elements given.
    """
    key, corrected = what.stream(Role.WEIGHT), accumulation == "vc"
    target = float(torch.as_tensor(variance, dtype=torch.float64).mean())
    value = mean
    if not corrected and target > 0:
        root = variance.double().sqrt() if isinstance(variance, Tensor) else variance**0.5
        value = mean + (root * normals(mean.shape, key, device=mean.device)).to(mean.dtype)
    achieved, view = target, 0.0
    tops: dict[str, Any] = {}
    high, low, unreachable, clipped, new = 1.0, 0.0, 0.0, 0.0, value
    if fmt is not None:
        plan = variance_plan(mean, variance, fmt)
        unreachable, high = float(plan.unreachable.double().mean()), float(plan.high.double().mean())
        low = 1.0 - high - unreachable
        clipped = float(count_saturated(value, fmt, variance if corrected else 0.0)) / max(value.numel(), 1)
        if corrected:
            new = quantize_variance_corrected(mean, variance, fmt, key)
            added, tops = _tops(plan, new, fmt)
            achieved = float((plan.achieved * power_of_two(plan.gap_exponents) ** 2 + added).mean())
        elif accumulation == "naive":
            achieved = target + float(rounding_variance(value, fmt).mean())
            new = quantize(value, fmt, key=key)
            _, tops = _tops(variance_plan(value, 0.0, fmt), new, fmt)
        else:
            view = float(rounding_variance(value, fmt).mean())
    unchanged = float((new == theta).double().mean())
    return StepStatistics(
        what.name, theta.numel(), theta.numel(), target, achieved, 0.0, view, high, low, unreachable, clipped,
        unchanged, what.temperature(achieved), **tops,
    )  # fmt: skip


def _walk_variance(theta: Tensor, drift: Tensor, spec: StepSpec) -> tuple[Tensor, Tensor]:
    """Variance of the lattice walk's step per element, squared weight units, and the gap; float64."""
    assert spec.weight_format is not None
    told = spec.lr * spec.gradient_std
    plan = walk_plan(theta, drift, spec.noise_variance, spec.weight_format, rates=spec.rates, gradient_std=told)
    first, second = torch.zeros_like(plan.codes), torch.zeros_like(plan.codes)
    for j in range(1, int(plan.reach.max()) + 1):
        length = torch.full_like(plan.codes, j)
        up, down = (torch.where(length <= plan.reach, odds, 0.0) / plan.reach for odds in jump_odds(plan, length))
        first, second = first + j * (up - down), second + j * j * (up + down)
    gap = power_of_two(plan.gap_exponents).expand(theta.shape)
    leap = variance_plan(theta + drift, spec.noise_variance, spec.weight_format)  # a ballistic element takes Q^vc
    leap_variance = leap.achieved * power_of_two(leap.gap_exponents) ** 2
    return torch.where(plan.ballistic, leap_variance, (second - first**2) * gap**2), gap


def _describe_walk(theta: Tensor, mean: Tensor, spec: StepSpec, what: Measurement) -> StepStatistics:
    """As :func:`rounding_statistics`; ``unreachable`` are the elements where the walk has more variance than v."""
    v, fmt = spec.noise_variance, spec.weight_format
    assert fmt is not None
    drift = mean - theta
    variance, gap = _walk_variance(theta, drift, spec)
    high, more = v > gap**2 / 4, variance > v * (1 + 1e-6)
    told = spec.lr * spec.gradient_std
    key = what.stream(Role.WEIGHT)
    new = lattice_step(theta, drift, v, fmt, key=key, rates=spec.rates, gradient_std=told)
    achieved = float(variance.mean())
    return StepStatistics(
        what.name, theta.numel(), theta.numel(), v, achieved, 0.0, 0.0,
        float(high.double().mean()), float((~high & ~more).double().mean()), float((~high & more).double().mean()),
        float(count_saturated(mean, fmt)) / max(mean.numel(), 1), float((new == theta).double().mean()),
        what.temperature(achieved), **_standing(new, fmt),
    )  # fmt: skip
