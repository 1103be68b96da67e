"""How many blocks stand at their top: the mark that clamping leaves, against what chance would leave."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lpsgld.formats import FormatLike, NumberFormat, parse_format
from lightning_lpsgld.formats.exponents import exponent_of, finite_magnitude, power_of_two

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
    if fmt.top_code is None:
        return torch.zeros(0, dtype=torch.bool, device=values.device)
    largest = fmt.blocks.max(finite_magnitude(values.double()))
    mantissa = largest * power_of_two(-exponent_of(largest).clamp(min=-1000))
    return mantissa == _mantissa(fmt.top_code[0])


def clamps_at_top(fmt: FormatLike) -> bool:
    """Whether the largest element of a block saturates below the next power of two: published rule, OCP's scales."""
    return parse_format(fmt).clamps


def chance_at_top(fmt: NumberFormat) -> float:
    """Share of blocks that stand at the top if largest magnitudes are spread evenly in the logarithm.

    Where codes are clamped, all that lies between the top and the next exponent stays at the top, too.

    Example:
        >>> from lightning_lpsgld.formats import parse_format
        >>> [round(100 * chance_at_top(parse_format(name)), 2) for name in ("bfp8", "bfp8-clamp", "mxfp8e4m3")]
        [1.14, 1.7, 24.51]
    """
    if fmt.top_code is None:
        return 0.0
    top, gap = fmt.top_code
    half = gap / 2
    return math.log2((2.0 ** math.frexp(top)[1] if fmt.clamps else top + half) / (top - half))


def _mantissa(value: float) -> float:
    return 2.0 * math.frexp(value)[0]
