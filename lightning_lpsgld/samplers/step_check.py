"""The check of a fused step at its first use on a device: against the composition that defines it, on known tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import StepSpec, quantize
from lightning_lpsgld.ops.self_check import differing, first_use, known_values
from lightning_lpsgld.random import DrawKey

__all__ = ["step_trouble"]

#: A vector, rows that move in vectors, and rows that do not; rows that no program holds, for tensors of that size.
_SHAPES, _LONG = ((16,), (4, 64), (3, 27)), (1, 8200)
_LR, _DECAY, _VARIANCE = 0.1, 5e-4, 1e-5
_KEY = DrawKey(seed=2**63 + 11, step=2**31 + 5)


def step_trouble(
    composed: Callable[..., Tensor], spec: StepSpec, params: Sequence[Tensor], module: ModuleType
) -> str | None:
    """Why a module's fused step is not to be used for tensors like ``params``; ``None`` if it can.

    Args:
        composed: :func:`~lightning_lpsgld.samplers.updates.langevin_step_`.
        spec: What the step does; its formats and its accumulation count.
        params: Weights: device and dtype of the first count, and whether one is large.
        module: Backend.
    """
    param, large = params[0], any(p.numel() >= _LONG[1] for p in params)
    formats = (spec.weight_format, spec.gradient_format)
    kinds = [(type(fmt).__name__, getattr(fmt, "top", "")) for fmt in formats]
    name = ("langevin_steps_", spec.accumulation, *kinds, param.dtype, param.device, large)
    what = f"the {spec.accumulation} step, weights {formats[0]}, gradients {formats[1]}, {str(param.dtype)[6:]}"

    def check() -> str:
        known = replace(spec, lr=_LR, weight_decay=_DECAY, noise_variance=_VARIANCE)
        shapes = (*_SHAPES, _LONG) if large else _SHAPES
        takes = [shape for shape in shapes if _takes(module, shape, param.dtype, param.device, formats)]
        return _difference(composed, module, known, takes, param)

    return first_use(name, "langevin_steps_", what, param.device, check)


def _takes(module: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, formats: Any) -> bool:
    x = torch.empty(shape, dtype=dtype, device=device)
    return module.refusal("langevin_steps_", x, [fmt for fmt in formats if fmt is not None]) is None


def _difference(
    composed: Callable[..., Tensor], module: Any, spec: StepSpec, shapes: Sequence[tuple[int, ...]], like: Tensor
) -> str:
    """What a step of known tensors does otherwise than the composition; ``""`` if nothing."""
    weights = [_on_grid(known_values(shape, 10 + i, like.dtype), spec.weight_format) for i, shape in enumerate(shapes)]
    grads = [known_values(shape, 20 + i, like.dtype) for i, shape in enumerate(shapes)]
    sums = [w.float() + 1e-3 for w in weights] if spec.accumulation == "full" else None
    keys, indices = [_KEY] * len(shapes), range(len(shapes))
    ours = [w.to(like.device, copy=True) for w in weights]
    our_sums = None if sums is None else [a.to(like.device, copy=True) for a in sums]
    module.langevin_steps_(ours, [g.to(like.device) for g in grads], our_sums, spec, keys, indices)
    for i, (weight, grad) in enumerate(zip(weights, grads)):
        composed(weight, grad, None if sums is None else sums[i], spec, keys[i], i, "reference")
    for i, shape in enumerate(shapes):
        if spec.weight_format is None:
            problem = _far(ours[i], weights[i], f"weights of shape {shape}")
        else:
            problem = differing(ours[i], weights[i], exact=False, what=f"weights of shape {shape}")
        if not problem and sums is not None and our_sums is not None:
            problem = _far(our_sums[i], sums[i], f"accumulator of shape {shape}")
        if problem:
            return problem
    return ""


def _on_grid(x: Tensor, fmt: NumberFormat | None) -> Tensor:
    return x if fmt is None else quantize(x, fmt, rounding="nearest", backend="reference")


def _far(ours: Tensor, theirs: Tensor, what: str) -> str:
    """Where nothing is rounded to a grid, normals in float32 and one rounding of the sum may differ."""
    allowed = torch.finfo(theirs.dtype).eps * 2 * theirs.double().abs() + 1e-4 * _VARIANCE**0.5
    wrong = ~((ours.cpu().double() - theirs.double()).abs() <= allowed)
    return f"{what}: {int(wrong.sum())} of {theirs.numel()} elements are off" if bool(wrong.any()) else ""
