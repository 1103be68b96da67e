"""The definition of every op: plain torch in float64, slow and obvious. Never optimised.

All scaling is by powers of two built from exponent bits, so scaled values are exact; no ``log2``, ``pow``, ``exp2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import (
    BlockFloatingPoint,
    BlockFormat,
    FixedPoint,
    FloatingPoint,
    MicroscalingFloat,
    NumberFormat,
    block_exponent_range,
    code_dtype,
    scale_exponent_range,
)
from lightning_lpsgld.ops.blocks import block_max, expand_blocks
from lightning_lpsgld.ops.carry import BOUNDLESS, carried, fitted, open_bounds, raised_for_nearest
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.exponents import NOISE_REACH, exponent_of, finite_magnitude, power_of_two
from lightning_lpsgld.ops.microscaling import (
    element_of,
    has_hole,
    hole_key,
    scale_exponents,
    scale_exponents_with_noise,
    settled,
)
from lightning_lpsgld.random import DrawKey, normals, uniforms

__all__ = [
    "NOISE_REACH",
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


def _block_exponents(x: Tensor, fmt: BlockFloatingPoint, dtype: torch.dtype) -> Tensor:
    """Shared exponents, compact shape. Infinities take no part unless a block has nothing else (then: the largest)."""
    low, high = block_exponent_range(fmt, dtype)
    exponents = exponent_of(block_max(finite_magnitude(x), fmt)).clamp(low, high)
    only_infinite = (block_max(x.isinf().double(), fmt) > 0) & (block_max(finite_magnitude(x), fmt) == 0)
    return torch.where(only_infinite, torch.full_like(exponents, high), exponents)


def _gap_exponents(x: Tensor, fmt: NumberFormat, dtype: torch.dtype) -> Tensor:
    """log2 of the gap at every element, broadcastable against ``x``; ``x`` is float64, ``dtype`` the result's."""
    if isinstance(fmt, FixedPoint):
        return torch.tensor(-fmt.fraction_length, device=x.device)
    if isinstance(fmt, BlockFloatingPoint):
        return expand_blocks(_block_exponents(x, fmt, dtype), x.shape, fmt) + (2 - fmt.word_length)
    assert isinstance(fmt, FloatingPoint)  # microscaling formats are asked for their elements
    return exponent_of(finite_magnitude(x)).clamp(fmt.exponent_min, fmt.exponent_max) - fmt.mantissa_bits


def _code_bounds(gap_exponents: Tensor, fmt: NumberFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes at which values saturate; beyond every code where a block takes the next exponent instead."""
    gap = power_of_two(gap_exponents)
    if isinstance(fmt, FloatingPoint):
        return fmt.min / gap, fmt.max / gap
    if isinstance(fmt, BlockFloatingPoint):
        return open_bounds(gap_exponents, fmt, dtype)
    assert isinstance(fmt, FixedPoint)
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
    if isinstance(fmt, MicroscalingFloat):
        shift = _scale_exponents(wide, fmt, x.dtype)
        codes, gap_exponents = _codes(wide * power_of_two(-shift), fmt.element, rounding, key)
        return codes, gap_exponents + shift
    if isinstance(fmt, BlockFloatingPoint):
        codes, exponents = _block_codes(x, fmt, rounding, key)
        return codes, expand_blocks(exponents, x.shape, fmt) + (2 - fmt.word_length)
    gap_exponents = _gap_exponents(wide, fmt, x.dtype)
    low, high = _code_bounds(gap_exponents, fmt, x.dtype)
    codes = _round(wide * power_of_two(-gap_exponents), rounding, key)
    return codes.clamp(low, high), gap_exponents


def _block_codes(x: Tensor, fmt: BlockFloatingPoint, rounding: Rounding, key: DrawKey | None) -> tuple[Tensor, Tensor]:
    """Codes (float64, NaN kept) and the shared exponents that they are codes of, compact shape."""
    wide = x.double()
    exponents = _block_exponents(wide, fmt, x.dtype)
    if rounding == "nearest":
        exponents = raised_for_nearest(wide, exponents, fmt, x.dtype)
    gap_exponents = expand_blocks(exponents, x.shape, fmt) + (2 - fmt.word_length)
    codes = _round(wide * power_of_two(-gap_exponents), rounding, key)
    if rounding == "stochastic":
        assert key is not None
        codes, levels = carried(codes, gap_exponents, fmt, x.dtype, key)
        exponents = exponents + levels
    return codes.clamp(fmt.code_min, fmt.code_max), exponents


def _scale_exponents(x: Tensor, fmt: MicroscalingFloat, dtype: torch.dtype) -> Tensor:
    """log2 of the scale at every element."""
    return expand_blocks(scale_exponents(x, fmt, dtype), x.shape, fmt)


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
        high: target above 1/4, the most that one stochastic rounding can add: reached whatever the mean.
        gaussian: Drawn as a Gaussian first: the high ones; for floating point those with target above 1, whose noise
            stays below the next power of two because the gap was raised for it.
        rounding: p(1-p), what stochastic rounding of the mean has by itself, in units of gap**2.
        corrective: variance of the categorical draw of the small-variance regime, ``max(target - rounding, 0)``.
        low_code: Smallest code, broadcastable; beyond every code where a block takes the next exponent instead.
        high_code: Largest code, broadcastable; likewise.
        scales: log2 of the shared scale at every element, broadcastable; of microscaling formats only.

    What happens at the top of blocks is in :func:`lightning_lpsgld.ops.crossing.crossing`.
    """

    scaled: Tensor
    gap_exponents: Tensor
    target: Tensor
    high: Tensor
    rounding: Tensor
    corrective: Tensor
    low_code: Tensor
    high_code: Tensor
    gaussian: Tensor
    scales: Tensor | None = None

    @property
    def unreachable(self) -> Tensor:
        """Elements where rounding alone has more variance than the target."""
        return ~self.high & (self.rounding > self.target)

    @property
    def achieved(self) -> Tensor:
        """Variance delivered, in units of gap**2; what the top of a block adds or a clamp takes is not counted."""
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
    magnitude = finite_magnitude(mean)
    reach = magnitude + NOISE_REACH * sigma
    if isinstance(fmt, FloatingPoint):
        offset, (low, high) = -fmt.mantissa_bits, (fmt.exponent_min, fmt.exponent_max)
        exponents = exponent_of(magnitude).clamp(low, high)
        exponents = _with_headroom(exponents, reach, sigma, offset, 2 ** (fmt.mantissa_bits + 1))
        return exponents.clamp(low, high) + offset
    assert isinstance(fmt, BlockFloatingPoint)
    return expand_blocks(_vc_block_exponents(mean, sigma, fmt, dtype), mean.shape, fmt) + (2 - fmt.word_length)


def _vc_block_exponents(mean: Tensor, sigma: Tensor, fmt: BlockFloatingPoint, dtype: torch.dtype) -> Tensor:
    """Shared exponents with room for the noise, compact shape."""
    offset, (low, high) = 2 - fmt.word_length, block_exponent_range(fmt, dtype)
    reach = block_max(finite_magnitude(mean) + NOISE_REACH * sigma, fmt)
    smallest = -block_max(-sigma, fmt, fill=-math.inf)
    exponents = _with_headroom(_block_exponents(mean, fmt, dtype), reach, smallest, offset, fmt.code_max)
    return exponents.clamp(low, high)


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
    if isinstance(fmt, MicroscalingFloat):
        compact = scale_exponents_with_noise(wide, spread.sqrt(), fmt, dtype or mean.dtype)
        shift = expand_blocks(compact, mean.shape, fmt)
        inverse = power_of_two(-shift)
        plan = variance_plan(wide * inverse, spread * inverse * inverse, fmt.element)
        low, high = plan.low_code, plan.high_code
        if fmt.scaling == "fit":
            open_ = shift < scale_exponent_range(fmt, dtype or mean.dtype)[1]
            low, high = torch.where(open_, -BOUNDLESS, low), torch.where(open_, BOUNDLESS, high)
        return replace(plan, gap_exponents=plan.gap_exponents + shift, low_code=low, high_code=high, scales=shift)
    gap_exponents = _vc_gap_exponents(wide, spread.sqrt(), fmt, dtype or mean.dtype)
    inverse = power_of_two(-gap_exponents)
    scaled, target = wide * inverse, spread * inverse * inverse
    bounds = _code_bounds(gap_exponents, fmt, dtype or mean.dtype)
    part = scaled - scaled.floor()
    rounding = torch.where(scaled.isfinite(), part * (1.0 - part), torch.zeros_like(part))
    corrective = (target - rounding).clamp(min=0.0)
    gaussian = target > (1.0 if isinstance(fmt, FloatingPoint) else 0.25)
    return VariancePlan(scaled, gap_exponents, target, target > 0.25, rounding, corrective, *bounds, gaussian)


def _large_variance_codes(plan: VariancePlan, z: Tensor, u: Tensor) -> Tensor:
    """Gaussian of variance v - gap**2/4, round to nearest, then the categorical draw Cat(residual, gap**2/4)."""
    x = plan.scaled + (plan.target - 0.25).clamp(min=0.0).sqrt() * z
    nearest = x.round()
    residual = x - nearest
    down, up = (0.5 - residual) ** 2 / 2, (0.5 + residual) ** 2 / 2
    return nearest - 1 + (u >= down).double() + (u >= 1.0 - up).double()


def _small_variance_codes(plan: VariancePlan, u: Tensor, edge: float) -> Tensor:
    """Stochastic rounding plus a categorical draw Cat(0, v - p(1-p)gap**2), as one draw over four neighbours.

    Beyond ``edge``, a float's next power of two, only every second code exists: from it the draw goes one down with
    1/3 and two up with 1/6 of that variance instead of one either way with 1/2, which keeps mean and variance.
    """
    lower = plan.scaled.floor()
    p = plan.scaled - lower
    side = plan.corrective / 2
    above, below = lower == edge - 1, lower == -edge
    minus, two = (1 - p) * side / torch.where(below, 3.0, 1.0), p * side / torch.where(above, 3.0, 1.0)
    inward_up, inward_down = p * side * torch.where(above, 2 / 3, 1.0), (1 - p) * side * torch.where(below, 2 / 3, 1.0)
    upper = (1 - p) + inward_up - inward_down
    codes = lower + (u >= upper).double()
    return codes - (u < minus) * torch.where(below, 2.0, 1.0) + (u >= 1.0 - two) * torch.where(above, 2.0, 1.0)


def vc_codes(plan: VariancePlan, fmt: NumberFormat, key: DrawKey) -> Tensor:
    """Codes of Q^vc before saturation (float64, NaN kept)."""
    shape, device = plan.scaled.shape, plan.scaled.device
    u = uniforms(shape, key, device=device)
    z = normals(shape, key, device=device)
    grid = element_of(fmt)
    edge = 2.0 ** (grid.mantissa_bits + 1) if isinstance(grid, FloatingPoint) else math.inf
    large = _large_variance_codes(plan, z, u)
    large = torch.where(large.abs() > edge, 2.0 * (large / 2.0).round(), large)  # 6.7 standard deviations away
    codes = torch.where(plan.gaussian, large, _small_variance_codes(plan, u, edge))
    return torch.where(plan.scaled.isfinite(), codes, plan.scaled)


def quantize_variance_corrected(mean: Tensor, variance: float | Tensor, fmt: NumberFormat, key: DrawKey) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize_variance_corrected`."""
    plan = variance_plan(mean, variance, fmt)
    codes, gap_exponents = vc_codes(plan, fmt, key), plan.gap_exponents
    if isinstance(fmt, BlockFloatingPoint):
        codes, levels = carried(codes, gap_exponents, fmt, mean.dtype, key)
        codes = codes.clamp(fmt.code_min, fmt.code_max)
        gap_exponents = gap_exponents + expand_blocks(levels, mean.shape, fmt)
    if isinstance(fmt, MicroscalingFloat) and fmt.scaling == "fit":
        values = _fitted(codes * power_of_two(gap_exponents), mean, variance, fmt, key)
    else:
        values = codes.clamp(plan.low_code, plan.high_code) * power_of_two(gap_exponents)
    if isinstance(fmt, MicroscalingFloat) and has_hole(fmt):
        coin = uniforms(mean.shape, hole_key(key), device=mean.device) < 0.5
        values = settled(values, fmt, mean.dtype, coin)
    return (values + 0.0).to(mean.dtype)


def _fitted(values: Tensor, mean: Tensor, variance: float | Tensor, fmt: MicroscalingFloat, key: DrawKey) -> Tensor:
    """Draws with runs that pass the top of their scale taken to the next one, and saturated at the last."""
    sigma = variance.double().expand(mean.shape).sqrt() if isinstance(variance, Tensor) else math.sqrt(variance)
    return fitted(values, scale_exponents_with_noise(mean, sigma, fmt, mean.dtype), fmt, mean.dtype, key)


def encode(x: Tensor, fmt: NumberFormat, rounding: Rounding, key: DrawKey | None) -> Encoded:
    """See :func:`lightning_lpsgld.ops.encode`."""
    if isinstance(fmt, FloatingPoint):
        return Encoded(_bit_patterns(quantize(x, fmt, rounding, key), fmt), None, fmt)
    if isinstance(fmt, MicroscalingFloat):
        compact = scale_exponents(x.double(), fmt, x.dtype)
        elements = quantize(x, fmt, rounding, key).double() * power_of_two(-expand_blocks(compact, x.shape, fmt))
        return Encoded(_bit_patterns(elements, fmt.element), compact.to(torch.int8), fmt)
    missing = int(x.isnan().sum())
    if missing:
        raise ValueError(f"encode: the codes of {fmt} have no NaN, but {missing} of {x.numel()} elements are NaN.")
    if isinstance(fmt, BlockFloatingPoint):
        codes, exponents = _block_codes(x, fmt, rounding, key)
        return Encoded(codes.to(code_dtype(fmt)), exponents.to(torch.int8), fmt)
    codes, _ = _codes(x, fmt, rounding, key)
    return Encoded(codes.to(code_dtype(fmt)), None, fmt)


def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """See :func:`lightning_lpsgld.ops.decode`."""
    fmt, codes = encoded.format, encoded.codes
    if isinstance(fmt, FloatingPoint):
        return _from_bit_patterns(codes, fmt).to(dtype)
    if isinstance(fmt, FixedPoint):
        return (codes.double() * fmt.gap).to(dtype)
    assert encoded.exponents is not None
    shift = expand_blocks(encoded.exponents.long(), codes.shape, fmt)
    if isinstance(fmt, MicroscalingFloat):
        return (_from_bit_patterns(codes, fmt.element) * power_of_two(shift)).to(dtype)
    return (codes.double() * power_of_two(shift + (2 - fmt.word_length))).to(dtype)


def _bit_patterns(values: Tensor, fmt: FloatingPoint) -> Tensor:
    """Sign, exponent and mantissa fields of values that are on the grid."""
    missing = int(values.isnan().sum())
    if missing and fmt.specials == "none":
        raise ValueError(f"encode: {fmt} has no NaN, but {missing} of {values.numel()} elements are NaN.")
    wide = values.double()
    exponents = exponent_of(finite_magnitude(wide)).clamp(min=fmt.exponent_min)
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


def code_limits(x: Tensor, fmt: BlockFormat, variance: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """Smallest and largest value that each element may have, float64, broadcastable against ``x``.

    Beyond every finite value where the block takes the next exponent instead of saturating. Of a microscaling format
    they are those that Q^vc has for means ``x`` and ``variance``; 0: those of rounding ``x``.
    """
    if isinstance(fmt, MicroscalingFloat):
        sigma = variance.double().expand(x.shape).sqrt() if isinstance(variance, Tensor) else math.sqrt(variance)
        exponents = expand_blocks(scale_exponents_with_noise(x, sigma, fmt, x.dtype), x.shape, fmt)
        top = fmt.element.max * power_of_two(exponents)
        if fmt.scaling == "fit":
            top = torch.where(exponents < scale_exponent_range(fmt, x.dtype)[1], BOUNDLESS, top)
        return -top, top
    gap_exponents = _gap_exponents(x.double(), fmt, x.dtype)
    gap, (low, high) = power_of_two(gap_exponents), open_bounds(gap_exponents, fmt, x.dtype)
    return (gap * low).clamp(min=-BOUNDLESS), (gap * high).clamp(max=BOUNDLESS)
