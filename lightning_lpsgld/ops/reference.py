"""The definition of every op: plain torch in float64, slow and obvious. Never optimised.

All scaling is by powers of two built from exponent bits, so scaled values are exact; no ``log2``, ``pow``, ``exp2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import (
    BlockFloatingPoint,
    FixedPoint,
    FloatingPoint,
    NumberFormat,
    block_exponent_range,
    code_dtype,
)
from lightning_lpsgld.ops.blocks import block_max, expand_blocks
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.random import DrawKey, normals, uniforms, words

__all__ = [
    "VariancePlan",
    "decode",
    "encode",
    "exponent_of",
    "power_of_two",
    "quantize",
    "quantize_variance_corrected",
    "variance_plan",
]

Rounding = Literal["nearest", "stochastic"]

#: No normal draw exceeds this (random.normals), so a block with this much headroom never clips noise.
NOISE_REACH = 6.77


def power_of_two(exponent: Tensor) -> Tensor:
    """``2.0 ** exponent`` as float64 from the bits; int64 exponents in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def exponent_of(x: Tensor) -> Tensor:
    """``floor(log2(x))`` of positive finite float64 values as int64, exact; very small (-2000) for zero."""
    _, exponent = torch.frexp(x)
    return torch.where(x > 0, exponent.long() - 1, torch.full_like(exponent.long(), -2000))


def _finite_magnitude(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.zeros_like(x)).abs()


def _block_exponents(x: Tensor, fmt: BlockFloatingPoint, dtype: torch.dtype) -> Tensor:
    """Shared exponents, compact shape. Infinities take no part unless a block has nothing else (then: the largest)."""
    low, high = block_exponent_range(fmt, dtype)
    exponents = exponent_of(block_max(_finite_magnitude(x), fmt)).clamp(low, high)
    only_infinite = (block_max(x.isinf().double(), fmt) > 0) & (block_max(_finite_magnitude(x), fmt) == 0)
    return torch.where(only_infinite, torch.full_like(exponents, high), exponents)


def _gap_exponents(x: Tensor, fmt: NumberFormat, dtype: torch.dtype) -> Tensor:
    """log2 of the gap at every element, broadcastable against ``x``; ``x`` is float64, ``dtype`` the result's."""
    if isinstance(fmt, FixedPoint):
        return torch.tensor(-fmt.fraction_length, device=x.device)
    if isinstance(fmt, BlockFloatingPoint):
        return expand_blocks(_block_exponents(x, fmt, dtype), x.shape, fmt) + (2 - fmt.word_length)
    return exponent_of(_finite_magnitude(x)).clamp(fmt.exponent_min, fmt.exponent_max) - fmt.mantissa_bits


def _code_bounds(gap: Tensor, fmt: NumberFormat) -> tuple[Tensor, Tensor]:
    if isinstance(fmt, FloatingPoint):
        return fmt.min / gap, fmt.max / gap
    return torch.full_like(gap, fmt.code_min), torch.full_like(gap, fmt.code_max)


def _round(scaled: Tensor, rounding: Rounding, key: DrawKey | None) -> Tensor:
    if rounding == "nearest":
        return scaled.round()
    assert key is not None
    lower = scaled.floor()
    return lower + (uniforms(scaled.shape, key, device=scaled.device) < scaled - lower)


def _codes(x: Tensor, fmt: NumberFormat, rounding: Rounding, key: DrawKey | None) -> tuple[Tensor, Tensor]:
    """Rounded and saturated codes (float64, NaN kept) and log2 of the gap."""
    wide = x.double()
    gap_exponents = _gap_exponents(wide, fmt, x.dtype)
    gap = power_of_two(gap_exponents)
    low, high = _code_bounds(gap, fmt)
    codes = _round(wide * power_of_two(-gap_exponents), rounding, key)
    return codes.clamp(low, high), gap_exponents


def quantize(x: Tensor, fmt: NumberFormat, rounding: Rounding, key: DrawKey | None) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize`."""
    codes, gap_exponents = _codes(x, fmt, rounding, key)
    return (codes * power_of_two(gap_exponents) + 0.0).to(x.dtype)  # + 0.0: no negative zero


@dataclass(frozen=True)
class VariancePlan:
    """How Q^vc will treat every element: all that is decided before a draw.

    Attributes:
        scaled: mean / gap, float64.
        gap_exponents: log2 of the gap, broadcastable.
        target: variance / gap**2.
        high: target above 1/4, the most that one stochastic rounding can add: Gaussian first.
        rounding: p(1-p), what stochastic rounding of the mean has by itself, in units of gap**2.
        corrective: variance of the categorical draw of the small-variance regime, ``max(target - rounding, 0)``.
    """

    scaled: Tensor
    gap_exponents: Tensor
    target: Tensor
    high: Tensor
    rounding: Tensor
    corrective: Tensor

    @property
    def unreachable(self) -> Tensor:
        """Elements where rounding alone has more variance than the target."""
        return ~self.high & (self.rounding > self.target)

    @property
    def achieved(self) -> Tensor:
        """Variance delivered, in units of gap**2 (saturation not counted)."""
        return torch.where(self.high, self.target, torch.maximum(self.target, self.rounding))


def _with_headroom(exponents: Tensor, reach: Tensor, sigma: Tensor, gap_offset: int, code_top: int) -> Tensor:
    """Raise exponents so that noise does not clip, as far as the coarser gap still leaves every variance reachable.

    ``exponents`` are those of the means alone, ``reach`` bounds |mean| + noise, ``sigma`` is the smallest noise
    standard deviation that shares the exponent; the gap is ``2**(exponent + gap_offset)``.
    """
    wanted = exponent_of(reach)
    wanted = wanted + (reach > code_top * power_of_two((wanted + gap_offset).clamp(min=-1022)))
    free = exponent_of(2.0 * sigma) - gap_offset  # gap <= 2 sigma: every p(1-p) gap**2 <= variance
    return torch.maximum(exponents, torch.minimum(wanted, free))


def _vc_gap_exponents(mean: Tensor, sigma: Tensor, fmt: NumberFormat, dtype: torch.dtype) -> Tensor:
    if isinstance(fmt, FixedPoint):
        return _gap_exponents(mean, fmt, dtype)
    magnitude = _finite_magnitude(mean)
    reach = magnitude + NOISE_REACH * sigma
    if isinstance(fmt, FloatingPoint):
        offset, (low, high) = -fmt.mantissa_bits, (fmt.exponent_min, fmt.exponent_max)
        exponents = exponent_of(magnitude).clamp(low, high)
        exponents = _with_headroom(exponents, reach, sigma, offset, 2 ** (fmt.mantissa_bits + 1))
        return exponents.clamp(low, high) + offset
    offset, (low, high) = 2 - fmt.word_length, block_exponent_range(fmt, dtype)
    smallest = -block_max(-sigma, fmt, fill=-math.inf)
    exponents = _with_headroom(
        _block_exponents(mean, fmt, dtype), block_max(reach, fmt), smallest, offset, fmt.code_max
    )
    return expand_blocks(exponents.clamp(low, high), mean.shape, fmt) + offset


def variance_plan(
    mean: Tensor, variance: float | Tensor, fmt: NumberFormat, dtype: torch.dtype | None = None
) -> VariancePlan:
    """Decide gap and regime of every element once, from the mean and the noise's reach.

    Args:
        mean: Floating tensor of any shape.
        variance: Target variance, >= 0; a float or a tensor that broadcasts to ``mean``.
        fmt: Target grid.
        dtype: dtype of the result, which bounds the exponents of a block; that of ``mean`` by default.

    Returns:
        The plan, float64.
    """
    wide = mean.double()
    spread = torch.as_tensor(variance, dtype=torch.float64, device=mean.device).expand(mean.shape)
    gap_exponents = _vc_gap_exponents(wide, spread.sqrt(), fmt, dtype or mean.dtype)
    inverse = power_of_two(-gap_exponents)
    scaled, target = wide * inverse, spread * inverse * inverse
    part = scaled - scaled.floor()
    rounding = torch.where(scaled.isfinite(), part * (1.0 - part), torch.zeros_like(part))
    corrective = (target - rounding).clamp(min=0.0)
    return VariancePlan(scaled, gap_exponents, target, target > 0.25, rounding, corrective)


def _large_variance_codes(plan: VariancePlan, z: Tensor, u: Tensor) -> Tensor:
    """Gaussian of variance v - gap**2/4, round to nearest, then the categorical draw Cat(residual, gap**2/4)."""
    x = plan.scaled + (plan.target - 0.25).clamp(min=0.0).sqrt() * z
    nearest = x.round()
    residual = x - nearest
    down, up = (0.5 - residual) ** 2 / 2, (0.5 + residual) ** 2 / 2
    return nearest - 1 + (u >= down).double() + (u >= 1.0 - up).double()


def _small_variance_codes(plan: VariancePlan, u: Tensor) -> Tensor:
    """Stochastic rounding plus a categorical draw Cat(0, v - p(1-p)gap**2), as one draw over four neighbours."""
    lower = plan.scaled.floor()
    p = plan.scaled - lower
    side = plan.corrective / 2
    minus, zero, two = (1 - p) * side, (1 - p) * (1 - 2 * side) + p * side, p * side
    return lower - 1 + (u >= minus).double() + (u >= minus + zero).double() + (u >= 1.0 - two).double()


def _mend_binade(codes: Tensor, fmt: FloatingPoint, gap_exponents: Tensor, coin: Tensor) -> Tensor:
    """Beyond the next power of two only every second code exists: send odd ones up or down with equal probability."""
    unit = torch.where(codes.abs() >= 2.0 ** (fmt.mantissa_bits + 2), 4.0, 2.0)
    beyond = (codes.abs() > 2.0 ** (fmt.mantissa_bits + 1)) & (codes % unit != 0)
    lower = (codes / unit).floor() * unit
    odds = (codes - lower) / unit
    return torch.where(beyond, lower + unit * (coin < odds), codes)


def vc_codes(plan: VariancePlan, fmt: NumberFormat, key: DrawKey) -> Tensor:
    """Codes of Q^vc before saturation (float64, NaN kept)."""
    shape, device = plan.scaled.shape, plan.scaled.device
    u = uniforms(shape, key, device=device)
    z = normals(shape, key, device=device)
    codes = torch.where(plan.high, _large_variance_codes(plan, z, u), _small_variance_codes(plan, u))
    if isinstance(fmt, FloatingPoint):
        coin = ((words(shape, key, device=device) & 511).double() + 0.5) / 512  # bits that `uniforms` leaves unused
        codes = _mend_binade(codes, fmt, plan.gap_exponents, coin)
    return torch.where(plan.scaled.isfinite(), codes, plan.scaled)


def quantize_variance_corrected(mean: Tensor, variance: float | Tensor, fmt: NumberFormat, key: DrawKey) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize_variance_corrected`."""
    plan = variance_plan(mean, variance, fmt)
    gap = power_of_two(plan.gap_exponents)
    low, high = _code_bounds(gap, fmt)
    return (vc_codes(plan, fmt, key).clamp(low, high) * gap + 0.0).to(mean.dtype)


def encode(x: Tensor, fmt: NumberFormat, rounding: Rounding, key: DrawKey | None) -> Encoded:
    """See :func:`lightning_lpsgld.ops.encode`."""
    if isinstance(fmt, FloatingPoint):
        return Encoded(_bit_patterns(quantize(x, fmt, rounding, key), fmt), None, fmt)
    missing = int(x.isnan().sum())
    if missing:
        raise ValueError(f"encode: the codes of {fmt} have no NaN, but {missing} of {x.numel()} elements are NaN.")
    codes, _ = _codes(x, fmt, rounding, key)
    exponents = None
    if isinstance(fmt, BlockFloatingPoint):
        exponents = _block_exponents(x.double(), fmt, x.dtype).to(torch.int8)
    return Encoded(codes.to(code_dtype(fmt)), exponents, fmt)


def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """See :func:`lightning_lpsgld.ops.decode`."""
    fmt, codes = encoded.format, encoded.codes
    if isinstance(fmt, FloatingPoint):
        return _from_bit_patterns(codes, fmt).to(dtype)
    if isinstance(fmt, FixedPoint):
        return (codes.double() * fmt.gap).to(dtype)
    assert encoded.exponents is not None
    shift = expand_blocks(encoded.exponents.long(), codes.shape, fmt) + (2 - fmt.word_length)
    return (codes.double() * power_of_two(shift)).to(dtype)


def _bit_patterns(values: Tensor, fmt: FloatingPoint) -> Tensor:
    """Sign, exponent and mantissa fields of values that are on the grid."""
    missing = int(values.isnan().sum())
    if missing and fmt.specials == "none":
        raise ValueError(f"encode: {fmt} has no NaN, but {missing} of {values.numel()} elements are NaN.")
    wide = values.double()
    exponents = exponent_of(_finite_magnitude(wide)).clamp(min=fmt.exponent_min)
    ulps = torch.nan_to_num(wide.abs() * power_of_two(fmt.mantissa_bits - exponents)).long()
    hidden = 2**fmt.mantissa_bits
    normal = ((exponents + fmt.bias) << fmt.mantissa_bits) + (ulps - hidden)
    pattern = torch.where(ulps >= hidden, normal, ulps)
    pattern = torch.where(wide.isnan(), 2 ** (fmt.bits - 1) - 1, pattern)
    pattern = torch.where(wide < 0, pattern + 2 ** (fmt.bits - 1), pattern)
    width = torch.iinfo(code_dtype(fmt)).bits
    return torch.where(pattern >= 2 ** (width - 1), pattern - 2**width, pattern).to(code_dtype(fmt))


def _from_bit_patterns(codes: Tensor, fmt: FloatingPoint) -> Tensor:
    pattern = codes.long() & (2**fmt.bits - 1)
    field = (pattern >> fmt.mantissa_bits) & (2**fmt.exponent_bits - 1)
    mantissa = pattern & (2**fmt.mantissa_bits - 1)
    ulps = torch.where(field > 0, mantissa + 2**fmt.mantissa_bits, mantissa).double()
    value = ulps * power_of_two(field.clamp(min=1) - fmt.bias - fmt.mantissa_bits)
    if fmt.specials != "none":
        value = torch.where(value > fmt.max, math.nan, value)
    return torch.where(pattern >> (fmt.bits - 1) > 0, -value, value) + 0.0


def code_limits(x: Tensor, fmt: BlockFloatingPoint) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each element's block, float64, broadcastable against ``x``."""
    gap = power_of_two(_gap_exponents(x.double(), fmt, x.dtype))
    return gap * fmt.code_min, gap * fmt.code_max
