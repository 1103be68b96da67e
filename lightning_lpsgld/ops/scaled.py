"""A fused backend's ops for microscaling formats, made of its ops for floating-point elements.

Dividing a float32 by the scale of its run loses nothing that the grid of the elements can see: what underflows is far
below the smallest draw. So results are those of :mod:`.reference`, bit for bit where the backend's are for elements.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor

from lightning_lpsgld.formats import FixedPoint, MicroscalingFloat
from lightning_lpsgld.formats.exponents import power_of_two
from lightning_lpsgld.ops import reference
from lightning_lpsgld.ops.carry import coins_of, hole_key
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.random import DrawKey

__all__ = ["Scaled"]

#: With more scales than this in one tensor the reference is faster than a pass of the kernel for each.
_MOST_SCALES = 24


def _times(x: Tensor, exponents: Tensor, fmt: MicroscalingFloat) -> Tensor:
    """``x`` with every run multiplied by its power of two."""
    factors = power_of_two(exponents).to(x.dtype)
    if x.ndim and x.numel() and x.shape[-1] % fmt.block_size == 0:
        return (x.unflatten(-1, (-1, fmt.block_size)) * factors.unsqueeze(-1)).flatten(-2)
    return x * fmt.blocks.expand(factors, x.shape)


def _chosen(runs: Tensor, yes: Tensor, no: Tensor, fmt: MicroscalingFloat) -> Tensor:
    """``yes`` in the runs that are chosen (compact shape), ``no`` elsewhere."""
    if yes.ndim and yes.numel() and yes.shape[-1] % fmt.block_size == 0:
        size = (-1, fmt.block_size)
        return torch.where(runs.unsqueeze(-1), yes.unflatten(-1, size), no.unflatten(-1, size)).flatten(-2)
    return torch.where(fmt.blocks.expand(runs, yes.shape), yes, no)


class Scaled:
    """A fused backend's ops for a microscaling format, made of those for its elements.

    Args:
        module: Backend that takes the element format and float32 tensors.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def quantize(
        self, x: Tensor, fmt: MicroscalingFloat, rounding: Literal["nearest", "stochastic"], key: DrawKey | None
    ) -> Tensor:
        """See :func:`lightning_lpsgld.ops.quantize`."""
        exponents = fmt.exponents(x, x.dtype)
        elements = self.module.quantize(_times(x.float(), -exponents, fmt), fmt.element, rounding, key)
        return _times(elements, exponents, fmt).to(x.dtype)

    def quantize_variance_corrected(
        self, mean: Tensor, variance: float | Tensor, fmt: MicroscalingFloat, key: DrawKey
    ) -> Tensor:
        """See :func:`lightning_lpsgld.ops.quantize_variance_corrected`.

        The kernel takes one variance, so it runs once for every scale there is in the tensor, most often three to six.
        """
        if isinstance(variance, Tensor) and variance.numel() != 1:
            return reference.quantize_variance_corrected(mean, variance, fmt, key)
        exponents = fmt.exponents_with_noise(mean, math.sqrt(float(variance)), mean.dtype)
        scales = exponents.unique().tolist()
        if len(scales) > _MOST_SCALES:
            return reference.quantize_variance_corrected(mean, variance, fmt, key)
        elements = _times(mean.float(), -exponents, fmt)
        values = torch.zeros_like(elements)
        draw = self.module.quantize_variance_corrected if fmt.scaling == "floor" else self.module.draw_beyond_range
        for exponent in scales:
            target = math.ldexp(float(variance), -2 * exponent)
            values = _chosen(exponents == exponent, draw(elements, target, fmt.element, key), values, fmt)
        beyond = fmt.scaling == "fit" and bool((values.abs() > fmt.element.max).any())
        values = _times(values, exponents, fmt)
        if beyond:
            coins = coins_of(key, mean.shape, mean.device)
            return fmt.fitted(values.double(), exponents, mean.dtype, coins).to(mean.dtype)
        if fmt.has_hole and bool(fmt.in_hole(values, mean.dtype)[0].any()):
            halves = torch.full_like(values, 0.5)
            coin = self.module.quantize(halves, FixedPoint(2, 0), "stochastic", hole_key(key))  # [u < 1/2]
            values = fmt.settled(values, mean.dtype, coin)
        return values.to(mean.dtype)

    def encode(
        self, x: Tensor, fmt: MicroscalingFloat, rounding: Literal["nearest", "stochastic"], key: DrawKey | None
    ) -> Encoded:
        """See :func:`lightning_lpsgld.ops.encode`."""
        exponents = fmt.exponents(x, x.dtype)
        elements = self.module.encode(_times(x.float(), -exponents, fmt), fmt.element, rounding, key)
        return Encoded(elements.codes, exponents.to(torch.int8), fmt)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """See :func:`lightning_lpsgld.ops.decode`."""
        fmt, exponents = cast(MicroscalingFloat, encoded.format), encoded.exponents
        assert exponents is not None
        wide = torch.promote_types(dtype, torch.float32)
        elements = self.module.decode(Encoded(encoded.codes, None, fmt.element), wide)
        return _times(elements, exponents.long(), fmt).to(dtype)

    def decode_packed(self, packed: Tensor, exponents: Tensor | None, fmt: MicroscalingFloat, out: Tensor) -> bool:
        """See :func:`lightning_lpsgld.ops.cpu.decode_packed`."""
        fused = getattr(self.module, "decode_packed", None)
        if fused is None or exponents is None or not fused(packed, None, fmt.element, out):
            return False
        factors = power_of_two(exponents.long()).to(out.dtype)
        if out.ndim and out.shape[-1] % fmt.block_size == 0:
            out.unflatten(-1, (-1, fmt.block_size)).mul_(factors.unsqueeze(-1))
        else:
            out.mul_(fmt.blocks.expand(factors, out.shape))
        return True
