"""Scales of microscaling runs.

A microscaling op is: find the scale of each run, divide, apply the op of the element format, multiply. Here scales are
found; :mod:`.reference` does the rest in float64, :mod:`.scaled` in float32 around a fused backend.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_lpsgld.formats import MicroscalingFloat, NumberFormat, scale_exponent_range
from lightning_lpsgld.ops.blocks import block_max, expand_blocks
from lightning_lpsgld.ops.exponents import NOISE_REACH, exponent_of, finite_magnitude, power_of_two
from lightning_lpsgld.random import DrawKey, derive_seed

__all__ = [
    "element_of",
    "has_hole",
    "hole_key",
    "in_hole",
    "scale_exponents",
    "scale_exponents_with_noise",
    "settled",
]


def element_of(fmt: NumberFormat) -> NumberFormat:
    """Format of the elements over their scale: that of a microscaling format's elements, ``fmt`` itself for others."""
    return fmt.element if isinstance(fmt, MicroscalingFloat) else fmt


def _floor(largest: Tensor, fmt: MicroscalingFloat) -> Tensor:
    return exponent_of(largest) - fmt.element.exponent_max


def _fit(largest: Tensor, fmt: MicroscalingFloat) -> Tensor:
    """Smallest scale at which ``largest`` does not saturate."""
    exponent = _floor(largest, fmt)
    return exponent + (largest > fmt.element.max * power_of_two(exponent.clamp(min=-1022)))


_RULES = {"floor": _floor, "fit": _fit}


def _largest(x: Tensor, fmt: MicroscalingFloat) -> Tensor:
    """Largest finite magnitude of every run, float64; infinity for a run with infinities and nothing else but zeros."""
    top = block_max(x.abs(), fmt).double()
    if x.device.type == "cpu" and bool(top.isfinite().all()):  # elsewhere the answer would have to be waited for
        return top
    finite = block_max(finite_magnitude(x), fmt).double()
    alone = (finite == 0) & (block_max(x.isinf().to(x.dtype), fmt) > 0)
    return torch.where(alone, torch.full_like(finite, torch.inf), finite)


def _held(exponents: Tensor, largest: Tensor, fmt: MicroscalingFloat, dtype: torch.dtype) -> Tensor:
    """Exponents within what ``dtype`` can represent; the highest where there is nothing finite."""
    low, high = scale_exponent_range(fmt, dtype)
    return torch.where(largest.isinf(), torch.full_like(exponents, high), exponents.clamp(low, high))


def scale_exponents(x: Tensor, fmt: MicroscalingFloat, dtype: torch.dtype) -> Tensor:
    """log2 of the scale of every run of ``x`` (int64, compact shape), held to what ``dtype`` can represent.

    Infinities take no part unless a run has nothing else (then: the largest scale).
    """
    largest = _largest(x, fmt)
    return _held(_RULES[fmt.scaling](largest, fmt), largest, fmt, dtype)


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
    finest = fmt.element.exponent_min - fmt.element.mantissa_bits
    largest = _largest(mean, fmt)
    if isinstance(sigma, Tensor):
        reach = block_max(finite_magnitude(mean) + NOISE_REACH * sigma, fmt)
        quietest = -block_max(-sigma, fmt, fill=-torch.inf)
    else:
        reach = torch.where(largest.isinf(), 0.0, largest + NOISE_REACH * sigma)
        quietest = torch.full_like(reach, sigma)
    wanted = torch.minimum(_fit(reach, fmt), exponent_of(2.0 * quietest) - finest)
    return _held(torch.maximum(_RULES[fmt.scaling](largest, fmt), wanted), largest, fmt, dtype)


def has_hole(fmt: MicroscalingFloat) -> bool:
    """Whether a run may not have every value of its grid as its largest magnitude; see :func:`settled`."""
    return fmt.scaling == "floor" and fmt.element.specials == "nan"


def hole_key(key: DrawKey) -> DrawKey:
    """Key of the coins of :func:`settled`: draws that share nothing with those of ``key``."""
    return replace(key, seed=derive_seed(key.seed, "hole"))


def in_hole(values: Tensor, fmt: MicroscalingFloat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For every run, whether its largest magnitude would saturate when met again; and log2 of its scale then."""
    exponents = scale_exponents(values, fmt, dtype)
    return _largest(values, fmt) > fmt.element.max * power_of_two(exponents), exponents


def settled(values: Tensor, fmt: MicroscalingFloat, dtype: torch.dtype, coin: Tensor) -> Tensor:
    """Move values that the format would saturate when it meets them again; fair, so the mean stays.

    Under ``"floor"`` a run of e4m3 cannot have a largest magnitude of 1.875 times a power of two, because that code is
    NaN there. Noise at a raised scale may land on it: it then goes to 1.75 or to 2 times the power of two. No other
    element type has such a hole, and ``"fit"`` has none.

    Args:
        values: Values on the grid of some scale.
        fmt: A format that :func:`has_hole`.
        dtype: dtype of the result.
        coin: 0 (towards zero) or 1, shape of ``values``.
    """
    lost, exponents = in_hole(values, fmt, dtype)
    top = torch.where(lost, fmt.element.max * power_of_two(exponents), torch.inf).to(values.dtype)
    next_power = power_of_two(exponents + (fmt.element.exponent_max + 1)).to(values.dtype)
    top, next_power = (expand_blocks(ends, values.shape, fmt) for ends in (top, next_power))
    return torch.where(values.abs() > top, torch.where(coin > 0, next_power, top).copysign(values), values)
