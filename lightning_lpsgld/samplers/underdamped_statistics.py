"""What a step of underdamped dynamics does to the noise of a tensor's positions and velocities."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.flow import Flow
from lightning_lpsgld.ops.reference import power_of_two, variance_plan
from lightning_lpsgld.random import DrawKey, Role
from lightning_lpsgld.samplers.statistics import (
    Measurement,
    StepStatistics,
    rounding_statistics,
    rounding_variance,
    same_rows,
)
from lightning_lpsgld.samplers.underdamped import (
    UnderdampedSpec,
    gaussian_noise,
    given_position,
    new_position,
    velocity_scale,
)

__all__ = ["underdamped_statistics"]


def underdamped_statistics(
    theta: Tensor, velocity: Tensor, grad: Tensor, spec: UnderdampedSpec, what: Measurement, at_one: Flow
) -> StepStatistics:
    r"""Measure what a step will do to a tensor, before it is done; target, achieved and the shares are the position's.

    Per step a slow direction is moved by :math:`\xi_x + \xi_v/\gamma` in the long run, whose variance at temperature T
    is exactly :math:`2u\eta T/(\gamma N)`. With what is achieved instead of it this defines the effective temperature:

    .. math::
        T_\mathrm{eff} = \frac{\gamma N}{2u\eta} \Big(\mathrm{Var}\,x' + \tfrac2\gamma \mathrm{Cov}(x', v')
        + \tfrac1{\gamma^2} \mathrm{Var}\,v'\Big)

    Args:
        theta: Position, or its accumulator where there is one; dtype of the velocity.
        velocity: Before the step; not modified.
        grad: Gradient of the batch-mean loss.
        spec: The step.
        what: Whose step, which, and how much of it. Of a subset, a rescaled velocity has the scale of the subset.
        at_one: Coefficients of the step, with the variances of T = 1.

    Returns:
        The statistics. Variances are given the gradient and, where noise comes before rounding, one draw of it.
    """
    numel, formats = theta.numel(), (spec.weight_format, spec.velocity_format, spec.gradient_format)
    theta, velocity, grad = same_rows((theta, velocity, grad), formats, what.max_elements)
    gradient_rounding, minibatch = 0.0, _minibatch(grad, spec.flow, what)
    if spec.gradient_format is not None:
        gradient_rounding = spec.flow.shift**2 * float(rounding_variance(grad, spec.gradient_format).mean())
        grad = quantize(grad, spec.gradient_format, key=what.stream(Role.GRADIENT))
    force = grad.to(velocity.dtype) + spec.weight_decay * theta
    mean = theta + spec.flow.carry * velocity - spec.flow.shift * force
    found = rounding_statistics(theta, mean, spec.flow.var_x, spec.weight_format, spec.accumulation, what)
    mean_velocity = spec.flow.keep * velocity - spec.flow.kick * force
    moved = _velocity_variance(mean, mean_velocity, spec, what)
    return replace(
        found,
        numel=numel,
        gradient_rounding=gradient_rounding,
        minibatch=minibatch,
        velocity_target=spec.flow.var_v,
        velocity_achieved=moved,
        effective_temperature=_temperature(found.achieved, moved, spec.flow, at_one),
    )


def _temperature(position: float, velocity: float, flow: Flow, at_one: Flow) -> float:
    if at_one.var_x == 0:  # a step of size 0
        return math.nan
    time = _time(at_one)
    return _spread(position, flow.cov, velocity, time) / _spread(at_one.var_x, at_one.cov, at_one.var_v, time)


def _time(flow: Flow) -> float:
    """1 / friction."""
    return flow.carry / (1.0 - flow.keep)


def _spread(var_x: float, cov: float, var_v: float, time: float) -> float:
    """Variance that a step's noise adds to a slow direction in the long run."""
    return var_x + 2.0 * time * cov + time**2 * var_v


def _minibatch(grad: Tensor, flow: Flow, what: Measurement) -> float:
    """The position's target times (minibatch noise over noise asked for) of a slow direction in the long run."""
    if flow.var_x == 0:
        return math.nan
    time = _time(flow)
    far = (flow.shift + time * flow.kick) ** 2
    return what.gradient_variance(grad, far) * flow.var_x / _spread(flow.var_x, flow.cov, flow.var_v, time)


def _velocity_variance(mean: Tensor, mean_velocity: Tensor, spec: UnderdampedSpec, what: Measurement) -> float:
    """Mean over elements of Var v' given the gradient: what was asked for, and what rounding adds to it."""
    target = spec.flow.var_v
    if spec.velocity_format is None or spec.accumulation in ("float", "full"):
        return target
    position_key, velocity_key = what.stream(Role.WEIGHT), what.stream(Role.VELOCITY)
    _, error, achieved = new_position(mean, spec, position_key, "auto")
    more, variance = given_position(error, achieved, spec.flow)
    return target + _velocity_excess(mean_velocity + more, variance, spec, velocity_key)


def _velocity_excess(mean: Tensor, variance: float | Tensor, spec: UnderdampedSpec, key: DrawKey) -> float:
    fmt = spec.velocity_format
    assert fmt is not None
    if spec.accumulation == "naive":
        mean, variance = mean + gaussian_noise(mean, variance, key), 0.0
    rescaled = spec.rescale and fmt.gap is not None and mean.numel() > 0
    scale = velocity_scale(mean, variance, fmt) if rescaled else mean.new_ones(())
    scale = scale.double()
    plan = variance_plan(mean / scale.to(mean.dtype), variance / scale**2, fmt)
    gap = power_of_two(plan.gap_exponents) * scale
    return float((plan.achieved * gap**2 - torch.as_tensor(variance, dtype=torch.float64)).mean())
