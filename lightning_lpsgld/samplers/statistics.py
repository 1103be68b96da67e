"""What one step does to a tensor's noise: the numbers behind the effective-temperature meter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import StepSpec, quantize
from lightning_lpsgld.ops.blocks import crosses_rows
from lightning_lpsgld.ops.lattice import jump_odds, lattice_step, walk_plan
from lightning_lpsgld.ops.reference import power_of_two, quantize_variance_corrected, variance_plan
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id
from lightning_lpsgld.samplers.updates import descend, saturated

__all__ = ["StepStatistics", "step_statistics"]


@dataclass(frozen=True)
class StepStatistics:
    r"""Noise of one step of one tensor, measured on ``count`` of its elements.

    Attributes:
        name: Name of the parameter.
        numel: Elements of the tensor.
        count: Elements measured.
        target: v, the noise variance asked for.
        achieved: Mean variance of the new weight (of the accumulator, where there is one) given the gradient.
        gradient_rounding: Mean variance that the gradient's rounding adds, :math:`\eta^2 p(1-p)\Delta_G^2`.
        view_rounding: Mean variance of the weight around its full accumulator; 0 without one.
        high: Share of elements with v > Δ²/4 (Gaussian, then categorical correction).
        low: Share with v <= Δ²/4 and v reachable.
        unreachable: Share where rounding alone has more variance than v.
        saturated: Share outside the range of the weight format.
        unchanged: Share that this step leaves exactly where it was.
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


def _subset(x: Tensor, fmt: NumberFormat | None, max_elements: int) -> Tensor:
    """Evenly spaced indices of dim 0; all of ``x`` where blocks run across them."""
    if x.numel() <= max_elements or x.ndim == 0 or crosses_rows(fmt, x.ndim):
        return x
    keep = max(1, x.shape[0] * max_elements // x.numel())
    return x[torch.linspace(0, x.shape[0] - 1, keep, device=x.device).long()]


def _part(theta: Tensor, grad: Tensor, spec: StepSpec, max_elements: int) -> tuple[Tensor, Tensor, StepSpec]:
    """The same rows of weight, gradient and (where it is a tensor) noise of the gradient."""
    part = _subset(theta, spec.weight_format, max_elements), _subset(grad, spec.gradient_format, max_elements)
    if part[0].shape != part[1].shape:  # one of the two formats has blocks across dim 0
        return theta, grad, spec
    if isinstance(spec.gradient_std, Tensor):
        told = _subset(spec.gradient_std.expand_as(theta), spec.weight_format, max_elements)
        spec = replace(spec, gradient_std=told)
    return *part, spec


def _rounding_variance(x: Tensor, fmt: NumberFormat) -> Tensor:
    """p(1-p)gap**2 of stochastic rounding, float64."""
    plan = variance_plan(x, 0.0, fmt)
    return plan.rounding * power_of_two(plan.gap_exponents) ** 2


def step_statistics(
    name: str, theta: Tensor, grad: Tensor, spec: StepSpec, key: DrawKey, index: int, max_elements: int
) -> StepStatistics:
    """Measure what a step with ``spec`` will do to ``theta``, before it is done.

    Variances are exact given the gradient (for naive rounding: given the noise of one draw). The share ``unchanged`` is
    from one draw; with all elements measured it is the draw that the step will make.

    Args:
        name: Name of the parameter.
        theta: Weight, or its accumulator where there is one.
        grad: Gradient of the batch-mean loss.
        spec: The step.
        key: Seed and step.
        index: Number of the tensor among the sampler's parameters.
        max_elements: Larger tensors are measured on a subset.

    Returns:
        The statistics.
    """
    theta, grad, spec = _part(theta, grad, spec, max_elements)
    gradient_rounding = 0.0
    if spec.gradient_format is not None:
        gradient_rounding = spec.lr**2 * float(_rounding_variance(grad, spec.gradient_format).mean())
        grad = quantize(grad, spec.gradient_format, key=key.at(stream=stream_id(Role.GRADIENT, index)))
    mean = descend(theta, grad.to(theta.dtype), lr=spec.lr, weight_decay=spec.weight_decay)
    if spec.accumulation == "lattice":
        return _describe_walk(name, theta, mean, spec, key.at(stream=stream_id(Role.WEIGHT, index)), gradient_rounding)
    return _describe(name, theta, mean, spec, key.at(stream=stream_id(Role.WEIGHT, index)), gradient_rounding)


def _describe(
    name: str, theta: Tensor, mean: Tensor, spec: StepSpec, key: DrawKey, gradient_rounding: float
) -> StepStatistics:
    v, fmt = spec.noise_variance, spec.weight_format
    noise = v**0.5 * normals(mean.shape, key, device=mean.device).to(mean.dtype) if v else torch.zeros_like(mean)
    value = mean if spec.accumulation == "vc" else mean + noise
    achieved, view = v, 0.0
    high, low, unreachable, clipped, new = 1.0, 0.0, 0.0, 0.0, value
    if fmt is not None:
        plan = variance_plan(mean, v, fmt)
        unreachable = float(plan.unreachable.double().mean())
        high = float(plan.high.double().mean())
        low = 1.0 - high - unreachable
        clipped = float(saturated(value, fmt, v if spec.accumulation == "vc" else 0.0)) / max(value.numel(), 1)
        extra = float(_rounding_variance(value, fmt).mean())
        if spec.accumulation == "vc":
            achieved = float((plan.achieved * power_of_two(plan.gap_exponents) ** 2).mean())
            new = quantize_variance_corrected(mean, v, fmt, key)
        elif spec.accumulation == "naive":
            achieved = v + extra
            new = quantize(value, fmt, key=key)
        else:
            view = extra
    unchanged = float((new == theta).double().mean())
    return StepStatistics(
        name, theta.numel(), mean.numel(), v, achieved, gradient_rounding, view,
        high, low, unreachable, clipped, unchanged,
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


def _describe_walk(
    name: str, theta: Tensor, mean: Tensor, spec: StepSpec, key: DrawKey, gradient_rounding: float
) -> StepStatistics:
    """As :func:`_describe`; ``unreachable`` are the elements where the walk has more variance than v."""
    v, fmt = spec.noise_variance, spec.weight_format
    assert fmt is not None
    drift = mean - theta
    variance, gap = _walk_variance(theta, drift, spec)
    high, more = v > gap**2 / 4, variance > v * (1 + 1e-6)
    told = spec.lr * spec.gradient_std
    new = lattice_step(theta, drift, v, fmt, key=key, rates=spec.rates, gradient_std=told)
    return StepStatistics(
        name, theta.numel(), mean.numel(), v, float(variance.mean()), gradient_rounding, 0.0,
        float(high.double().mean()), float((~high & ~more).double().mean()), float((~high & more).double().mean()),
        float(saturated(mean, fmt)) / max(mean.numel(), 1), float((new == theta).double().mean()),
    )  # fmt: skip
