r"""One step of underdamped Langevin dynamics, exact for a frozen gradient, and its rounding: functions on tensors.

The dynamics :math:`dv = -\gamma v\,dt - uG\,dt + \sqrt{2\gamma u\tau}\,dB,\; dx = v\,dt` have the invariant law
:math:`\exp(-(U(x) + \lVert v\rVert^2/2u)/\tau)`. Over a time η, with :math:`h = \gamma\eta` and :math:`e = \exp(-h)`,

.. math::
    v' &= e\,v - \tfrac{u}{\gamma}(1 - e)\,G + \xi_v, &
    \mathrm{Var}\,\xi_v &= u\tau(1 - e^2) \\
    x' &= x + \tfrac{1 - e}{\gamma}\,v - \tfrac{u}{\gamma^2}(h + e - 1)\,G + \xi_x, &
    \mathrm{Var}\,\xi_x &= \tfrac{u\tau}{\gamma^2}(2h + 4e - e^2 - 3) \\
    && \mathrm{Cov}(\xi_x, \xi_v) &= \tfrac{u\tau}{\gamma}(1 - e)^2

Published texts and code print a plus before the position's gradient term; integrating the equation gives the minus.

Reference:
    Cheng, Chatterji, Bartlett & Jordan, 2018, arXiv:1707.03663, appendix A (exact integration).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import quantize, quantize_variance_corrected
from lightning_lpsgld.ops.dispatch import BackendName, choose_motion
from lightning_lpsgld.ops.flow import Flow, exact_flow
from lightning_lpsgld.ops.reference import NOISE_REACH, exponent_of, power_of_two, variance_plan
from lightning_lpsgld.ops.spec import UnderdampedSpec
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id
from lightning_lpsgld.samplers.updates import count_saturated, put_

__all__ = [
    "Flow",
    "UnderdampedSpec",
    "exact_flow",
    "gaussian_noise",
    "given_position",
    "new_position",
    "underdamped_step_",
    "underdamped_steps_",
    "velocity_scale",
]


def velocity_scale(mean: Tensor, variance: float | Tensor, fmt: NumberFormat) -> Tensor:
    """Smallest power of two S such that no mean of ``mean`` with its noise leaves S times the range of ``fmt``.

    Args:
        mean: Mean velocity.
        variance: Of the noise that is still to be added; 0 if it is already in ``mean``.
        fmt: Format of v / S, of one gap.

    Returns:
        0-d float64 tensor. S times the gap stays a normal float32 number.
    """
    spread = torch.as_tensor(variance, dtype=torch.float64, device=mean.device).max().sqrt()
    ratio = (mean.double().abs().max() + NOISE_REACH * spread) / fmt.max
    exponent = exponent_of(ratio)
    exponent = exponent + (ratio > power_of_two(exponent.clamp(min=-1022)))
    assert fmt.gap is not None  # others are not rescaled
    ends = [math.frexp(size)[1] - 1 for size in (fmt.max, fmt.gap)]
    return power_of_two(exponent.clamp(-126 - ends[1], 126 - ends[0]))


def _round_velocity(
    mean: Tensor, variance: float | Tensor, spec: UnderdampedSpec, key: DrawKey, backend: BackendName
) -> tuple[Tensor, Tensor | None]:
    """Velocity of the given mean and variance on its grid (Gaussian where it has none), and its scale."""
    fmt = spec.velocity_format
    if fmt is None or spec.accumulation in ("float", "full"):
        return mean + gaussian_noise(mean, variance, key), None
    if spec.accumulation == "naive":
        mean, variance = mean + gaussian_noise(mean, variance, key), 0.0
    rescaled = spec.rescale and fmt.gap is not None and mean.numel() > 0
    scale = velocity_scale(mean, variance, fmt) if rescaled else None
    one = mean.new_ones((), dtype=torch.float64) if scale is None else scale
    units = mean / one.to(mean.dtype)
    if spec.accumulation == "naive":
        rounded = quantize(units, fmt, key=key, backend=backend)
    else:
        rounded = quantize_variance_corrected(units, variance / one**2, fmt, key=key, backend=_corrected(backend))
    return rounded * one.to(mean.dtype), scale


def _corrected(backend: BackendName) -> BackendName:
    return "auto" if backend == "qtorch" else backend  # QPyTorch has no variance-corrected op


def gaussian_noise(mean: Tensor, variance: float | Tensor, key: DrawKey) -> Tensor:
    """Normal draws of the shape and dtype of ``mean`` with a variance; zeros where it is 0."""
    if not isinstance(variance, Tensor) and variance == 0:
        return torch.zeros_like(mean)
    root = torch.as_tensor(variance, dtype=torch.float64, device=mean.device).sqrt()
    return (root * normals(mean.shape, key, device=mean.device)).to(mean.dtype)


def given_position(error: Tensor, achieved: float | Tensor, flow: Flow) -> tuple[Tensor | float, float | Tensor]:
    """Mean and variance of the velocity's noise given that of the position, whose variance is ``achieved``."""
    if flow.cov == 0:
        return 0.0, flow.var_v
    if not isinstance(achieved, Tensor):
        return flow.cov / achieved * error, max(flow.var_v - flow.cov**2 / achieved, 0.0)
    slope = flow.cov / achieved  # achieved >= var_x > 0 where cov > 0
    return (slope * error.double()).to(error.dtype), (flow.var_v - flow.cov * slope).clamp(min=0.0)


def new_position(
    mean: Tensor, spec: UnderdampedSpec, key: DrawKey, backend: BackendName
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Position before any plain rounding, its error about the mean, and that error's variance."""
    fmt, variance = spec.weight_format, spec.flow.var_x
    if spec.accumulation != "vc":
        noise = gaussian_noise(mean, variance, key)
        return mean + noise, noise, variance
    assert fmt is not None
    new = quantize_variance_corrected(mean, variance, fmt, key=key, backend=_corrected(backend))
    plan = variance_plan(mean, variance, fmt)
    gap = power_of_two(plan.gap_exponents)
    inside = (plan.scaled.clamp(plan.low_code, plan.high_code) * gap).to(mean.dtype)
    return new, new - inside, plan.achieved * gap**2


def underdamped_step_(
    param: Tensor,
    velocity: Tensor,
    accumulator: Tensor | None,
    grad: Tensor,
    spec: UnderdampedSpec,
    key: DrawKey,
    index: int = 0,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""One step of one tensor and its velocity, in place.

    ``"vc"`` draws the position first, :math:`x' = Q^{vc}(\mu_x, \mathrm{Var}\,\xi_x)`, and then the velocity about its
    conditional mean, :math:`v' = Q^{vc}(\mu_v + \beta\,(x' - \mu_x),\; \mathrm{Var}\,\xi_v - \beta\,\mathrm{Cov})` with
    :math:`\beta = \mathrm{Cov} / \mathrm{Var}[x']`: all three moments of the noise are right wherever Q^vc can reach
    :math:`\mathrm{Var}\,\xi_x`, and where it cannot, only the position's variance is larger. (The other order would ask
    the position's grid for a quarter of the variance.)

    Args:
        param: θ, any shape, floating dtype; overwritten.
        velocity: v, shape of ``param``, float32 or wider; overwritten.
        accumulator: x, shape of ``param``, float32; overwritten. Only with ``accumulation="full"``.
        grad: Gradient of the batch-mean loss; not modified.
        spec: What the step does.
        key: Seed, step and offset of the draws.
        index: Number of the tensor among the sampler's parameters.
        backend: For the ops.

    Returns:
        Number of positions outside the range of the weight format (0-d int64), and the velocity's scale, if any.
    """
    weight_key, velocity_key = (key.at(stream=stream_id(role, index)) for role in (Role.WEIGHT, Role.VELOCITY))
    if spec.gradient_format is not None:
        grad = quantize(grad, spec.gradient_format, key=key.at(stream=stream_id(Role.GRADIENT, index)), backend=backend)
    x = (param if accumulator is None else accumulator).to(velocity.dtype)
    force = grad.to(velocity.dtype) + spec.weight_decay * x
    mean_x = x + spec.flow.carry * velocity - spec.flow.shift * force
    position, error, achieved = new_position(mean_x, spec, weight_key, backend)
    more, variance = given_position(error, achieved, spec.flow)
    mean_v = spec.flow.keep * velocity - spec.flow.kick * force + more
    new_velocity, scale = _round_velocity(mean_v, variance, spec, velocity_key, backend)
    velocity.copy_(new_velocity)
    fmt = spec.weight_format
    if spec.accumulation == "vc":
        assert fmt is not None
        param.copy_(position)  # drawn on the grid
        return count_saturated(mean_x, fmt, spec.flow.var_x), scale
    return put_(param, accumulator, position, fmt, weight_key, backend), scale


def underdamped_steps_(
    params: Sequence[Tensor],
    velocities: Sequence[Tensor],
    accumulators: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    specs: Sequence[UnderdampedSpec],
    keys: Sequence[DrawKey],
    indices: Sequence[int],
    backend: BackendName = "auto",
) -> tuple[Tensor, list[Tensor | None]]:
    """One step of many tensors, by a fused kernel where one takes them all, else tensor by tensor.

    Args:
        params: Weights; overwritten.
        velocities: Their velocities; overwritten.
        accumulators: float32 accumulators; ``None`` where there is none.
        grads: Gradients.
        specs: What the step does to each.
        keys: Seed, step and offset of the draws of each.
        indices: Number of each weight among the sampler's parameters.
        backend: For the ops and the fused step.

    Returns:
        Positions outside the range of the weight format per weight (int64, shape ``(len(params),)``), and the scale of
        each velocity that has one.
    """
    rounded = [fmt for s in specs for fmt in (s.weight_format, s.velocity_format, s.gradient_format)]
    formats = list(dict.fromkeys(fmt for fmt in rounded if fmt is not None))
    fused = choose_motion(backend, [*params, *velocities], formats)
    if fused is not None:
        counts, scales = fused.underdamped_steps_(params, velocities, accumulators, grads, specs, keys, indices)
        return counts, scales
    found = [
        underdamped_step_(param, velocity, total, grad, spec, key, index, backend)
        for param, velocity, total, grad, spec, key, index in zip(
            params, velocities, accumulators, grads, specs, keys, indices
        )
    ]
    return torch.stack([count for count, _ in found]), [scale for _, scale in found]
