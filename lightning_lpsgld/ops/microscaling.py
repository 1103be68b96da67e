"""Scales of microscaling runs.

A microscaling op is: find the scale of each run, divide, apply the op of the element format, multiply. Here scales are
found; :mod:`.reference` does the rest in float64, :mod:`.scaled` in float32 around a fused backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.formats import MicroscalingFloat, NumberFormat, scale_exponent_range
from lightning_lpsgld.ops.blocks import block_max, expand_blocks
from lightning_lpsgld.ops.exponents import NOISE_REACH, exponent_of, finite_magnitude, power_of_two

__all__ = ["element_of", "has_hole", "scale_exponents", "scale_exponents_with_noise", "settled"]


def element_of(fmt: NumberFormat) -> NumberFormat:
    """Format of the elements over their scale: that of a microscaling format's elements, ``fmt`` itself for others."""
    return fmt.element if isinstance(fmt, MicroscalingFloat) else fmt


def _floor(largest: Tensor, fmt: MicroscalingFloat) -> Tensor:
    return exponent_of(largest) - fmt.element.exponent_max


def _fit(largest: Tensor, fmt: MicroscalingFloat) -> Tensor:
    """Smallest scale at which ``largest`` does not saturate."""
    exponent = _floor(largest, fmt)
    return exponent + (largest > fmt.element.max * power_of_two(exponent.clamp(min=-1022)))


def scale_exponents(x: Tensor, fmt: MicroscalingFloat, dtype: torch.dtype) -> Tensor:
    """log2 of the scale of every run of ``x`` (int64, compact shape), held to what ``dtype`` can represent.

    Infinities take no part unless a run has nothing else (then: the largest scale).
    """
    low, high = scale_exponent_range(fmt, dtype)
    largest = block_max(finite_magnitude(x), fmt).double()
    exponents = (_fit if fmt.scaling == "fit" else _floor)(largest, fmt).clamp(low, high)
    only_infinite = (largest == 0) & (block_max(x.isinf().to(x.dtype), fmt) > 0)
    return torch.where(only_infinite, torch.full_like(exponents, high), exponents)


def scale_exponents_with_noise(
    mean: Tensor, sigma: float | Tensor, fmt: MicroscalingFloat, dtype: torch.dtype
) -> Tensor:
    """Scales for means that noise will be added to: raised until the noise fits, while every variance stays reachable.

    Args:
        mean: Means; the scale is never below theirs.
        sigma: Standard deviation of the noise, one for all or (float64) of the shape of ``mean``.
        fmt: The format.
        dtype: dtype of the result.

    Returns:
        log2 of the scales. At a raised one the gap around zero is at most twice the smallest ``sigma`` of the run.
    """
    low, high = scale_exponent_range(fmt, dtype)
    finest = fmt.element.exponent_min - fmt.element.mantissa_bits
    magnitude = finite_magnitude(mean)
    if isinstance(sigma, Tensor):
        reach = block_max(magnitude + NOISE_REACH * sigma, fmt)
        quietest = -block_max(-sigma, fmt, fill=-torch.inf)
    else:
        reach = block_max(magnitude, fmt).double() + NOISE_REACH * sigma
        quietest = torch.full_like(reach, sigma)
    wanted = torch.minimum(_fit(reach, fmt), exponent_of(2.0 * quietest) - finest)
    return torch.maximum(scale_exponents(mean, fmt, dtype), wanted).clamp(low, high)


def has_hole(fmt: MicroscalingFloat) -> bool:
    """Whether a run may not have every value of its grid as its largest magnitude; see :func:`settled`."""
    return fmt.scaling == "floor" and fmt.element.specials == "nan"


def settled(values: Tensor, fmt: MicroscalingFloat, dtype: torch.dtype, coin: Tensor) -> Tensor:
    """Move values that the format would saturate when it meets them again; fair, so the mean stays.

    Under ``"floor"`` a run of e4m3 cannot have a largest magnitude of 1.875 times a power of two, because that code is
    NaN there. Noise at a raised scale may land on it: it then goes to 1.75 or to 2 times the power of two. No other
    element type has such a hole, and ``"fit"`` has none.

    Args:
        values: Values on the grid of some scale.
        fmt: The format.
        dtype: dtype of the result.
        coin: 0 (towards zero) or 1, shape of ``values``.
    """
    if not has_hole(fmt):
        return values
    exponents = expand_blocks(scale_exponents(values, fmt, dtype), values.shape, fmt)
    top = fmt.element.max * power_of_two(exponents).to(values.dtype)
    beyond = power_of_two(exponents + (fmt.element.exponent_max + 1)).to(values.dtype)
    moved = torch.where(coin > 0, beyond, top)
    return torch.where(values.abs() > top, moved.copysign(values), values)
