"""The definition of every op: plain torch in float64, slow and obvious. Never optimised.

All scaling is by powers of two built from exponent bits, so scaled values are exact; no ``log2``, ``pow``, ``exp2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.formats.exponents import NOISE_REACH, exponent_of, power_of_two
from lightning_lpsgld.ops.carry import coins_of
from lightning_lpsgld.ops.encoded import Encoded
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
    "vc_codes",
]

Rounding = Literal["nearest", "stochastic"]
#: Codes (float64, NaN kept), log2 of their gaps, and the exponents that blocks share, compact.
_Codes = tuple[Tensor, Tensor, Tensor | None]


def _round(scaled: Tensor, rounding: Rounding, key: DrawKey | None) -> Tensor:
    if rounding == "nearest":
        return scaled.round()
    assert key is not None
    lower = scaled.floor()
    return lower + (uniforms(scaled.shape, key, device=scaled.device) < scaled - lower)


def _codes(x: Tensor, fmt: NumberFormat, rounding: Rounding, key: DrawKey | None) -> _Codes:
    """Rounded and saturated codes."""
    wide = x.double()
    exponents = fmt.exponents(wide, x.dtype)
    if rounding == "nearest":
        exponents = fmt.exponents_for_nearest(wide, exponents, x.dtype)
    gap_exponents = fmt.gap_exponents(wide, exponents)
    codes = _round(wide * power_of_two(-gap_exponents), rounding, key)
    if rounding == "stochastic":
        assert key is not None
        coins = coins_of(key, x.shape, x.device)
        codes, gap_exponents, exponents = fmt.carried(codes, gap_exponents, exponents, x.dtype, coins)
    return fmt.saturated(codes, gap_exponents, exponents), gap_exponents, exponents


def quantize(x: Tensor, fmt: NumberFormat, rounding: Rounding, key: DrawKey | None) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize`."""
    codes, gap_exponents, _ = _codes(x, fmt, rounding, key)
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
        exponents: Shared ones, compact; ``None`` where nothing is shared.
        scales: The shared exponent at every element, broadcastable; likewise.

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
    exponents: Tensor | None = None
    scales: Tensor | None = None

    @property
    def unreachable(self) -> Tensor:
        """Elements where rounding alone has more variance than the target."""
        return ~self.high & (self.rounding > self.target)

    @property
    def achieved(self) -> Tensor:
        """Variance delivered, in units of gap**2; what the top of a block adds or a clamp takes is not counted."""
        return torch.where(self.high, self.target, torch.maximum(self.target, self.rounding))


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
    wide, like = mean.double(), dtype or mean.dtype
    spread = torch.as_tensor(variance, dtype=torch.float64, device=mean.device).expand(mean.shape)
    sigma = spread.sqrt()
    exponents = fmt.exponents_with_noise(wide, sigma, like)
    gap_exponents = fmt.gap_exponents(wide, exponents, sigma)
    inverse = power_of_two(-gap_exponents)
    scaled, target = wide * inverse, spread * inverse * inverse
    part = scaled - scaled.floor()
    rounding = torch.where(scaled.isfinite(), part * (1.0 - part), torch.zeros_like(part))
    low, high = fmt.open_limits(gap_exponents, exponents, like)
    return VariancePlan(
        scaled=scaled,
        gap_exponents=gap_exponents,
        target=target,
        high=target > 0.25,
        rounding=rounding,
        corrective=(target - rounding).clamp(min=0.0),
        low_code=low,
        high_code=high,
        gaussian=target > (0.25 if math.isinf(fmt.edge) else 1.0),
        exponents=exponents,
        scales=None if exponents is None else fmt.blocks.expand(exponents, mean.shape),
    )


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
    edge = fmt.edge
    large = _large_variance_codes(plan, z, u)
    large = torch.where(large.abs() > edge, 2.0 * (large / 2.0).round(), large)  # 6.7 standard deviations away
    codes = torch.where(plan.gaussian, large, _small_variance_codes(plan, u, edge))
    return torch.where(plan.scaled.isfinite(), codes, plan.scaled)


def quantize_variance_corrected(mean: Tensor, variance: float | Tensor, fmt: NumberFormat, key: DrawKey) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize_variance_corrected`."""
    plan = variance_plan(mean, variance, fmt)
    drawn = vc_codes(plan, fmt, key), plan.gap_exponents, plan.exponents
    codes, gap_exponents, exponents = fmt.carried_with_noise(*drawn, mean.dtype, coins_of(key, mean.shape, mean.device))
    codes = fmt.saturated(codes, gap_exponents, exponents)
    return (codes * power_of_two(gap_exponents) + 0.0).to(mean.dtype)


def encode(x: Tensor, fmt: NumberFormat, rounding: Rounding, key: DrawKey | None) -> Encoded:
    """See :func:`lightning_lpsgld.ops.encode`."""
    codes, gap_exponents, exponents = _codes(x, fmt, rounding, key)
    packed = fmt.pack(codes, gap_exponents, exponents)
    return Encoded(packed, None if exponents is None else exponents.to(torch.int8), fmt)


def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """See :func:`lightning_lpsgld.ops.decode`."""
    return encoded.format.unpack(encoded.codes, encoded.exponents).to(dtype)
