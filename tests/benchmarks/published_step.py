"""The sampler step of the published code as a rival to time: the same sequence of tensor operations, in our own words.

Only its *cost* is of interest. Its results are not: in block floating point it draws no corrective noise where the
target variance is below a quarter of the squared gap (the square root of a negative number is masked later). It rounds
with QPyTorch's real ops, computes both regimes for every element of a block tensor and keeps one tensor per
intermediate quantity, as the published optimizer does, parameter by parameter.

The sequence: round the gradient; add weight decay; descend; then the variance-corrected quantizer.
"""

from __future__ import annotations

import torch
from qtorch.quant import block_quantize, fixed_point_quantize
from torch import Tensor

WORD = 8


def _categorical(mean: Tensor, variance: Tensor | float, gap: Tensor | float) -> Tensor:
    """Plus or minus one gap with the probabilities that give ``mean`` and ``variance``."""
    up = (variance + mean**2 + mean * gap) / (2 * gap**2)
    down = (variance + mean**2 - mean * gap) / (2 * gap**2)
    u = torch.rand_like(mean)
    out = torch.zeros_like(mean)
    out = torch.where(u < up, torch.full_like(mean, 1.0) * gap, out)
    return torch.where((u >= up) & (u < up + down), torch.full_like(mean, -1.0) * gap, out)


def vc_fixed(mean: Tensor, variance: float, fraction: int) -> Tensor:
    """Variance-corrected fixed point: one regime for the whole tensor."""
    gap = 2.0**-fraction
    most = gap**2 / 4
    low, high = -(2.0 ** (WORD - fraction - 1)), 2.0 ** (WORD - fraction - 1) - gap
    if variance > most:
        x = mean + (variance - most) ** 0.5 * torch.randn_like(mean)
        rounded = fixed_point_quantize(x, wl=WORD, fl=fraction, rounding="nearest")
        residual = x - rounded
        out = rounded + torch.sign(residual) * _categorical(residual.abs(), most, gap)
    else:
        rounded = fixed_point_quantize(mean, wl=WORD, fl=fraction, rounding="stochastic")
        residual = mean - rounded
        p = residual.abs() / gap
        spent = (1 - p) * residual**2 + p * (gap - residual.abs()) ** 2
        left = torch.clamp(variance - spent, min=0.0)
        out = rounded + torch.where(left > 0, _categorical(torch.zeros_like(mean), left, gap), torch.zeros_like(mean))
    return torch.clamp(out, low, high)


def _block_gap(x: Tensor) -> Tensor:
    """Gap of each block (index of dim 0) by logarithm and power, broadcast to the tensor."""
    largest = x.abs() if x.ndim == 1 else x.abs().reshape(x.shape[0], -1).max(dim=1)[0]
    exponent = torch.clamp(torch.floor(torch.log2(largest)), -128, 127)
    gap = 2.0 ** (exponent - (WORD - 2))
    return gap.reshape([-1] + [1] * (x.ndim - 1)) * torch.ones_like(x)


def _clip_block(x: Tensor, gap: Tensor) -> Tensor:
    limit = gap * 2 ** (WORD - 1)
    return torch.minimum(torch.maximum(x, -limit), limit - gap)


def vc_block(mean: Tensor, variance: float) -> Tensor:
    """Variance-corrected block floating point: both regimes for every element, then a selection."""
    gap = _block_gap(mean)
    most = gap**2 / 4
    x = mean + (variance - most) ** 0.5 * torch.randn_like(mean)  # NaN where variance < most, as published
    moved = _block_gap(x)
    nearest = block_quantize(x, wl=WORD, dim=0, rounding="nearest")
    residual = x - nearest
    wide = _clip_block(nearest + torch.sign(residual) * _categorical(residual.abs(), most, moved), moved)
    rounded = block_quantize(mean, wl=WORD, dim=0, rounding="stochastic")
    residual = mean - rounded
    p = residual.abs() / gap
    spent = (1 - p) * residual**2 + p * (gap - residual.abs()) ** 2
    left = torch.clamp(variance - spent, min=0.0)
    extra = torch.where(left > 0, _categorical(torch.zeros_like(mean), left, gap), torch.zeros_like(mean))
    return torch.where(variance > most, wide, _clip_block(rounded + extra, gap))


def step(
    params: list[Tensor], grads: list[Tensor], kind: str, *, lr: float, weight_decay: float, variance: float
) -> None:
    """One step of all parameters; ``kind`` is ``"fixed8"`` or ``"bfp8"``."""
    for param, grad in zip(params, grads):
        if kind == "fixed8":
            rounded = fixed_point_quantize(grad, wl=WORD, fl=8, rounding="stochastic")
        else:
            rounded = block_quantize(grad, wl=WORD, dim=0, rounding="stochastic")
        direction = rounded + weight_decay * param
        mean = param - lr * direction
        param.copy_(vc_fixed(mean, variance, 8) if kind == "fixed8" else vc_block(mean, variance))
