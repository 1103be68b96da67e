"""What a tensor dtype can hold of a format."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_lpsgld.formats.kinds import NumberFormat
from lightning_lpsgld.formats.microscaling import MicroscalingFloat
from lightning_lpsgld.formats.numbers import BlockFloatingPoint, FixedPoint

__all__ = ["block_exponent_range", "check_dtype", "code_dtype", "scale_exponent_range", "with_word_length"]

#: (significand bits with the hidden bit, exponent of the smallest subnormal, exponent of the largest power of two)
_DTYPE_FACTS: dict[torch.dtype, tuple[int, int, int]] = {
    torch.float64: (53, -1074, 1023),
    torch.float32: (24, -149, 127),
    torch.bfloat16: (8, -133, 127),
    torch.float16: (11, -24, 15),
}


def code_dtype(fmt: NumberFormat) -> torch.dtype:
    """Smallest signed integer dtype that holds the codes of ``fmt``."""
    return torch.int8 if fmt.bits <= 8 else torch.int16 if fmt.bits <= 16 else torch.int32


def check_dtype(fmt: NumberFormat, dtype: torch.dtype) -> None:
    """Refuse a tensor dtype in which values of ``fmt`` cannot be held exactly.

    Args:
        fmt: The format.
        dtype: Floating dtype of the tensor that would hold the rounded values.

    Raises:
        TypeError: If ``dtype`` is not float16, bfloat16, float32 or float64.
        ValueError: If the grid of ``fmt`` does not survive in ``dtype``.
    """
    if dtype not in _DTYPE_FACTS:
        raise TypeError(f"Quantization takes float16, bfloat16, float32 or float64 tensors, got {dtype}.")
    significand, lowest, highest = _DTYPE_FACTS[dtype]
    if isinstance(fmt, FixedPoint):
        need, low, high = fmt.word_length - 1, -fmt.fraction_length, fmt.word_length - 1 - fmt.fraction_length
    elif isinstance(fmt, BlockFloatingPoint):
        need, low, high = fmt.word_length - 1, lowest, min(fmt.exponent_max, highest)
    elif isinstance(fmt, MicroscalingFloat):
        need, low, high = fmt.mantissa_bits + 1, lowest, highest  # the scale adapts to the dtype
    else:
        need, low, high = fmt.mantissa_bits + 1, fmt.exponent_min - fmt.mantissa_bits, fmt.exponent_max
    if need > significand or low < lowest or high > highest:
        raise ValueError(
            f"{fmt} is wider than {dtype}: it needs {need} significand bits and exponents {low} to {high}, the dtype "
            f"has {significand} and {lowest} to {highest}. Use a narrower format or a wider dtype."
        )


def block_exponent_range(fmt: BlockFloatingPoint, dtype: torch.dtype) -> tuple[int, int]:
    """Shared exponents whose whole grid is representable in ``dtype``.

    The lower end is raised where the gap would be smaller than the smallest subnormal of ``dtype``.
    """
    _, lowest, highest = _DTYPE_FACTS[dtype]
    return max(fmt.exponent_min, lowest + fmt.word_length - 2), min(fmt.exponent_max, highest)


def scale_exponent_range(fmt: MicroscalingFloat, dtype: torch.dtype) -> tuple[int, int]:
    """log2 of the smallest and largest scale of a run whose whole grid is representable in ``dtype``."""
    _, lowest, highest = _DTYPE_FACTS[dtype]
    finest = fmt.element.exponent_min - fmt.element.mantissa_bits
    return max(fmt.exponent_min, lowest - finest), min(fmt.exponent_max, highest - fmt.element.exponent_max)


def with_word_length(fmt: NumberFormat, word_length: int) -> NumberFormat:
    """Copy of a fixed or block format with another word length (range of a fixed point kept)."""
    if isinstance(fmt, FixedPoint):
        shift = word_length - fmt.word_length
        return replace(fmt, word_length=word_length, fraction_length=fmt.fraction_length + shift)
    if isinstance(fmt, BlockFloatingPoint):
        return replace(fmt, word_length=word_length)
    raise TypeError(f"{fmt} has no word length to change.")
