"""How many blocks stand at their top: the mark that clamping leaves, against what chance would leave."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lpsgld.formats import (
    BlockFloatingPoint,
    BlockFormat,
    FormatLike,
    MicroscalingFloat,
    NumberFormat,
    parse_format,
)
from lightning_lpsgld.ops.blocks import block_max
from lightning_lpsgld.ops.exponents import exponent_of, finite_magnitude, power_of_two

__all__ = ["at_top", "chance_at_top", "clamps_at_top"]


def at_top(values: Tensor, fmt: NumberFormat) -> Tensor:
    """Whether the largest magnitude of a block is the last one before the next exponent.

    Args:
        values: On the grid of ``fmt``, whole blocks.
        fmt: A format; of one without blocks nothing is at a top.

    Returns:
        Bool, one per block (compact shape); of no blocks an empty one.

    Example:
        >>> from lightning_lpsgld.formats import parse_format
        >>> at_top(torch.tensor([0.9921875, 0.5, 1.0]), parse_format("bfp8"))
        tensor([ True, False, False])
    """
    if not isinstance(fmt, BlockFormat):
        return torch.zeros(0, dtype=torch.bool, device=values.device)
    largest = block_max(finite_magnitude(values.double()), fmt)
    mantissa = largest * power_of_two(-exponent_of(largest).clamp(min=-1000))
    return mantissa == _mantissa(_top(fmt))


def clamps_at_top(fmt: FormatLike) -> bool:
    """Whether the largest element of a block saturates below the next power of two: published rule, OCP's scales."""
    number = parse_format(fmt)
    if isinstance(number, BlockFloatingPoint):
        return number.top == "clamp"
    return isinstance(number, MicroscalingFloat) and number.scaling == "floor"


def chance_at_top(fmt: NumberFormat) -> float:
    """Share of blocks that stand at the top if largest magnitudes are spread evenly in the logarithm.

    Where codes are clamped, all that lies between the top and the next exponent stays at the top, too.

    Example:
        >>> from lightning_lpsgld.formats import parse_format
        >>> [round(100 * chance_at_top(parse_format(name)), 2) for name in ("bfp8", "bfp8-clamp", "mxfp8e4m3")]
        [1.14, 1.7, 24.51]
    """
    if not isinstance(fmt, (BlockFloatingPoint, MicroscalingFloat)):
        return 0.0
    top = _top(fmt)
    half = 0.5 if isinstance(fmt, BlockFloatingPoint) else _ulp(fmt) / 2
    return math.log2((2.0 ** math.frexp(top)[1] if clamps_at_top(fmt) else top + half) / (top - half))


def _top(fmt: BlockFormat) -> float:
    if isinstance(fmt, BlockFloatingPoint):
        return float(fmt.code_max)
    assert isinstance(fmt, MicroscalingFloat)
    return fmt.element.max


def _ulp(fmt: MicroscalingFloat) -> float:
    return 2.0 ** (fmt.element.exponent_max - fmt.element.mantissa_bits)


def _mantissa(value: float) -> float:
    return 2.0 * math.frexp(value)[0]
