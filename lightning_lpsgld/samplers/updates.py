r"""The equations of the samplers side by side: free functions on tensors, composed from the public ops.

Fused backends compute the same from the same draws. Notation: θ weight, g gradient of the batch-mean loss, η ``lr``,
λ ``weight_decay``, v ``noise_variance`` = 2ηT/N, ξ ~ N(0, I), Q_W and Q_G stochastic rounding, Q^vc the
variance-corrected quantizer.

===============  ==========================================================================
``"float"``      θ ← θ − η(Q_G(g) + λθ) + √v ξ
``"full"``       a ← a − η(Q_G(g) + λa) + √v ξ;  θ ← Q_W(a)          (SGLDLP-F)
``"naive"``      θ ← Q_W(θ − η(Q_G(g) + λθ) + √v ξ)                  (naive SGLDLP-L)
``"vc"``         θ ← Q^vc(θ − η(Q_G(g) + λθ), v)                     (VC SGLDLP-L)
``"lattice"``    θ ← walk(θ, −η(Q_G(g) + λθ), v)                     (:mod:`lightning_lpsgld.ops.lattice`)
===============  ==========================================================================

With v = 0 these are SGD, SGDLP-F and SGDLP-L. Where the sum is kept on a grid A beside the weight, between the two,
a takes the place of θ in ``"naive"`` and ``"vc"`` with Q_A, and :func:`views_` then sets θ ← Q_W(a).

Reference: Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, equations 2 to 4 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import StepSpec, quantize, quantize_variance_corrected
from lightning_lpsgld.ops.dispatch import BackendName, choose_step, choose_views
from lightning_lpsgld.ops.lattice import lattice_step
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id
from lightning_lpsgld.samplers.step_check import step_trouble

__all__ = [
    "count_saturated",
    "descend",
    "langevin_step_",
    "langevin_steps_",
    "noisy",
    "put_",
    "put_corrected_",
    "views_",
]


def descend(theta: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> Tensor:
    r"""Gradient step :math:`\theta - \eta\,(g + \lambda\theta)`; shapes and dtypes of ``theta``, nothing modified."""
    return theta - lr * (grad + weight_decay * theta) if weight_decay else theta - lr * grad


def noisy(mean: Tensor, noise_variance: float, key: DrawKey) -> Tensor:
    r"""Add Gaussian noise :math:`\sqrt v\,\xi`; with v = 0 no draw is made and ``mean`` is returned."""
    if noise_variance == 0:
        return mean
    return mean + (noise_variance**0.5 * normals(mean.shape, key, device=mean.device)).to(mean.dtype)


def count_saturated(x: Tensor, fmt: NumberFormat, variance: float | Tensor = 0.0) -> Tensor:
    """Number of elements of ``x`` outside the range of its grid, a 0-d int64 tensor (of its block's, for blocks).

    ``variance`` is that of Q^vc if ``x`` are its means: it may raise the scale of a microscaling format.
    """
    low, high = fmt.value_limits(x, variance)
    return ((x < low) | (x > high)).sum()


def put_(
    param: Tensor,
    accumulator: Tensor | None,
    value: Tensor,
    fmt: NumberFormat | None,
    key: DrawKey,
    backend: BackendName,
) -> Tensor:
    """Keep a new value: exactly in the accumulator, if there is one, and rounded stochastically in the weight.

    Args:
        param: θ, overwritten; in its dtype, and on the grid of ``fmt`` if there is one.
        accumulator: a, overwritten; ``None``: the weight is all there is.
        value: The new value, noise included.
        fmt: Grid of the weight.
        key: Of the rounding.
        backend: For the op.

    Returns:
        Number of values outside the range of the grid, 0-d int64.
    """
    if accumulator is not None:
        accumulator.copy_(value)
    if fmt is None:
        param.copy_(value)
        return torch.zeros((), dtype=torch.int64, device=param.device)
    value = value.to(param.dtype)
    param.copy_(quantize(value, fmt, key=key, backend=backend))
    return count_saturated(value, fmt)


def put_corrected_(
    param: Tensor, mean: Tensor, variance: float | Tensor, fmt: NumberFormat, key: DrawKey, backend: BackendName
) -> Tensor:
    """Set a weight to a draw of Q^vc with that mean and variance; arguments and result as :func:`put_`."""
    own: BackendName = "auto" if backend == "qtorch" else backend  # QPyTorch has no such op
    param.copy_(quantize_variance_corrected(mean, variance, fmt, key=key, backend=own))
    return count_saturated(mean, fmt, variance)


def langevin_step_(
    param: Tensor,
    grad: Tensor,
    accumulator: Tensor | None,
    spec: StepSpec,
    key: DrawKey,
    index: int = 0,
    backend: BackendName = "auto",
) -> Tensor:
    """One step of one tensor, in place, in the composition that defines it.

    Args:
        param: θ, any shape, floating dtype; overwritten.
        grad: g, shape and dtype of ``param``; not modified.
        accumulator: a, float32, shape of ``param``; overwritten. Only with ``spec.accumulation == "full"``.
        spec: What the step does.
        key: seed, step and offset of the draws; the streams are made from ``index``.
        index: Number of the tensor among the sampler's parameters.
        backend: For the ops.

    Returns:
        Number of values that were outside the range of the weight format when rounded (0-d int64).
    """
    weight_key = key.at(stream=stream_id(Role.WEIGHT, index))
    if spec.gradient_format is not None:
        gradient_key = key.at(stream=stream_id(Role.GRADIENT, index))
        grad = quantize(grad, spec.gradient_format, key=gradient_key, backend=backend)
    theta = param if accumulator is None else accumulator
    mean = descend(theta, grad.to(theta.dtype), lr=spec.lr, weight_decay=spec.weight_decay)
    fmt = spec.weight_format
    if spec.accumulation == "lattice":
        assert fmt is not None
        drift = -spec.lr * (grad.to(theta.dtype) + spec.weight_decay * theta)
        told = spec.lr * spec.gradient_std
        param.copy_(
            lattice_step(theta, drift, spec.noise_variance, fmt, key=weight_key, rates=spec.rates, gradient_std=told)
        )
        return count_saturated(mean, fmt)
    if spec.accumulation == "vc":
        assert fmt is not None
        return put_corrected_(param, mean, spec.noise_variance, fmt, weight_key, backend)
    return put_(param, accumulator, noisy(mean, spec.noise_variance, weight_key), fmt, weight_key, backend)


def langevin_steps_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor] | None,
    spec: StepSpec,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
    backend: BackendName = "auto",
) -> Tensor:
    """One step of many tensors, by a fused kernel where one takes them, else tensor by tensor.

    Args:
        params: Weights; overwritten.
        grads: Gradients, one per weight.
        accumulators: float32 accumulators, one per weight, or ``None``.
        spec: What the step does to each.
        keys: One per weight; they differ only in ``offset`` (shards).
        indices: Number of each weight among the sampler's parameters.
        backend: For the ops and the fused step.

    Returns:
        Saturated values per weight, int64, shape ``(len(params),)``.
    """
    if not params:
        return torch.zeros(0, dtype=torch.int64)
    formats = [fmt for fmt in (spec.weight_format, spec.gradient_format) if fmt is not None]
    fused = None
    if spec.accumulation != "lattice":
        trouble = partial(step_trouble, langevin_step_, spec, params)
        fused = choose_step(backend, params, *formats, distrust=trouble)
    if fused is not None:
        counts: Tensor = fused.langevin_steps_(params, grads, accumulators, spec, keys, indices)
        return counts
    rest = [None] * len(params) if accumulators is None else accumulators
    return torch.stack(
        [
            langevin_step_(param, grad, accumulator, spec, key, index, backend)
            for param, grad, accumulator, key, index in zip(params, grads, rest, keys, indices)
        ]
    )


def views_(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    fmt: NumberFormat,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
    backend: BackendName = "auto",
) -> Tensor:
    """Set weights to the stochastic rounding of the sums that are kept beside them, by draws of their own.

    Args:
        params: Weights; overwritten.
        sums: Their sums, one per weight, float32 or wider, same shapes; not modified.
        fmt: Grid of the weights.
        keys: Of the current step, one per weight; they differ only in ``offset`` (shards).
        indices: Number of each weight among the sampler's parameters.
        backend: For the ops.

    Returns:
        Sums outside the range of the weight's grid per weight, int64, shape ``(len(params),)``.
    """
    if not params:
        return torch.zeros(0, dtype=torch.int64)
    fused = choose_views(backend, params, fmt)
    if fused is not None:
        spec = StepSpec(0.0, 0.0, 0.0, fmt, None, "full")
        counts: Tensor = fused.langevin_steps_(params, None, sums, spec, keys, indices)
        return counts
    for param, total, key, index in zip(params, sums, keys, indices):
        key = key.at(stream=stream_id(Role.VIEW, index))
        param.copy_(quantize(total, fmt, key=key, backend=backend))
    return torch.stack([count_saturated(total, fmt) for total in sums])
