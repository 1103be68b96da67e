"""Fused CPU steps with a second tensor beside the weight: SGHMC's velocity, the preconditioner's second moment.

One call moves all tensors: gradient, both means, noise, both roundings, in runs that stay in the second-level cache
(``cpu_motion.cpp``). The equations and draws are those of :mod:`lightning_lpsgld.samplers.underdamped` and
:mod:`lightning_lpsgld.samplers.preconditioned`; what differs from the composition on the reference ops is said in
:mod:`.cpu`: thresholds and normals are float32, so that about one element in 10^5 lands on the neighbouring grid point.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import cpu
from lightning_lpsgld.ops.cpu_layout import MODES, Memory, native_format, native_key, run_length
from lightning_lpsgld.ops.cpu_library import Motion, MotionTensor, load
from lightning_lpsgld.ops.spec import PreconditionedSpec, UnderdampedSpec
from lightning_lpsgld.random import DrawKey, Role, stream_id

__all__ = ["preconditioned_steps_", "refusal", "underdamped_steps_"]


def refusal(tensors: Sequence[Tensor], formats: Sequence[NumberFormat]) -> str | None:
    """Why these steps are left to the composed ops; ``None`` if they are not.

    Args:
        tensors: Weights and what lies beside them.
        formats: All formats of the steps.
    """
    missing = cpu.unavailable()
    if missing is not None:
        return missing
    reasons = (cpu.refusal("langevin_steps_", tensor, formats) for tensor in tensors)
    return next((reason for reason in reasons if reason is not None), None)


def _underdamped(spec: UnderdampedSpec) -> Motion:
    flow, fmt = spec.flow, spec.velocity_format
    rounded = fmt is not None and spec.accumulation not in ("float", "full")
    motion = Motion(var_x=flow.var_x, var_v=flow.var_v, cov=flow.cov)
    motion.keep, motion.carry, motion.kick, motion.shift = flow.keep, flow.carry, flow.kick, flow.shift
    motion.slope = flow.cov / flow.var_x if flow.cov != 0 else 0.0
    motion.weight_decay, motion.has_velocity_format = spec.weight_decay, rounded
    if rounded and spec.rescale and fmt is not None and fmt.gap is not None:
        ends = [math.frexp(size)[1] - 1 for size in (fmt.max, fmt.gap)]
        motion.rescale, motion.velocity_max = True, fmt.max
        motion.scale_low, motion.scale_high = -126 - ends[1], 126 - ends[0]
    motion.velocity = native_format(fmt, torch.float32)
    return motion


def _preconditioned(spec: PreconditionedSpec) -> Motion:
    motion = Motion(noise=spec.noise_variance, family=1)
    motion.lr, motion.weight_decay, motion.shrinkage = spec.lr, spec.weight_decay, spec.shrinkage
    motion.beta, motion.rest, motion.eps, motion.weight = spec.beta, 1.0 - spec.beta, spec.eps, spec.weight
    return motion


def _fill(row: MotionTensor, param: Tensor, grad: Tensor, state: Tensor, total: Tensor | None, memory: Memory,
          formats: Sequence[NumberFormat | None]) -> None:  # fmt: skip
    dense, (row.channels, row.pixels) = memory.order_of(param, *formats)
    row.numel, row.last = param.numel(), param.shape[-1] if param.ndim else 1
    row.param, row.state = memory.address(param, dense), memory.address(state, dense)
    row.accumulator, row.grad = memory.address(total, dense), memory.address(grad, dense, written=False)
    lengths = [run_length(param.shape, fmt) for fmt in formats]
    row.weight_inner, row.velocity_inner, row.gradient_inner = lengths


def _run(
    params: Sequence[Tensor],
    states: Sequence[Tensor],
    accumulators: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    specs: Sequence[UnderdampedSpec] | Sequence[PreconditionedSpec],
    keys: Sequence[DrawKey],
    indices: Sequence[int],
) -> tuple[Tensor, list[MotionTensor]]:
    rows, memory = (MotionTensor * len(params))(), Memory()
    motions: dict[UnderdampedSpec | PreconditionedSpec, Motion] = {}
    for i, (row, param, key) in enumerate(zip(rows, params, keys)):
        spec: UnderdampedSpec | PreconditionedSpec = specs[i]
        velocity = spec.velocity_format if isinstance(spec, UnderdampedSpec) else None
        if spec not in motions:
            motion = _underdamped(spec) if isinstance(spec, UnderdampedSpec) else _preconditioned(spec)
            motion.mode, motion.has_gradient_format = MODES[spec.accumulation], spec.gradient_format is not None
            motion.position = native_format(spec.weight_format, torch.float32)
            motion.gradient = native_format(spec.gradient_format, torch.float32)
            motions[spec] = motion
        row.motion = ctypes.pointer(motions[spec])
        formats = (spec.weight_format, velocity, spec.gradient_format)
        _fill(row, param, grads[i], states[i], accumulators[i], memory, formats)
        named = ((Role.WEIGHT, "weight_key"), (Role.VELOCITY, "velocity_key"), (Role.GRADIENT, "gradient_key"))
        for role, name in named:
            setattr(row, name, native_key(key, stream_id(role, indices[i])))
    load()[0].lpsgld_motions(rows, len(params), torch.get_num_threads())
    memory.finish()
    return torch.tensor([row.saturated for row in rows], dtype=torch.int64), list(rows)


def underdamped_steps_(
    params: Sequence[Tensor],
    velocities: Sequence[Tensor],
    accumulators: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    specs: Sequence[UnderdampedSpec],
    keys: Sequence[DrawKey],
    indices: Sequence[int],
) -> tuple[Tensor, list[Tensor | None]]:
    """One step of all tensors; see :func:`lightning_lpsgld.samplers.underdamped.underdamped_steps_`."""
    counts, rows = _run(params, velocities, accumulators, grads, specs, keys, indices)
    scaled = (row.motion.contents.rescale and row.numel > 0 for row in rows)
    return counts, [torch.tensor(row.scale, dtype=torch.float64) if known else None for row, known in zip(rows, scaled)]


def preconditioned_steps_(
    params: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    accumulators: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    specs: Sequence[PreconditionedSpec],
    keys: Sequence[DrawKey],
    indices: Sequence[int],
) -> Tensor:
    """One step of all tensors; see :func:`lightning_lpsgld.samplers.preconditioned.preconditioned_steps_`."""
    return _run(params, second_moments, accumulators, grads, specs, keys, indices)[0]
