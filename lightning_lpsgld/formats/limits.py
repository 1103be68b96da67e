"""What a tensor dtype can hold of a format."""

from __future__ import annotations

import torch

from lightning_lpsgld.formats.base import NumberFormat
from lightning_lpsgld.formats.dtypes import DTYPES

__all__ = ["check_dtype", "code_dtype", "with_word_length"]


def code_dtype(fmt: NumberFormat) -> torch.dtype:
    """Smallest signed integer dtype that holds the codes of ``fmt``.

    Args:
        fmt: Any format.

    Returns:
        ``torch.int8``, ``int16`` or ``int32``.
    """
    return fmt.code_dtype


def check_dtype(fmt: NumberFormat, dtype: torch.dtype) -> None:
    """Refuse a tensor dtype in which values of ``fmt`` cannot be held exactly.

    Args:
        fmt: The format.
        dtype: Floating dtype of the tensor that would hold the rounded values.

    Raises:
        TypeError: If ``dtype`` is not float16, bfloat16, float32 or float64.
        ValueError: If the grid of ``fmt`` does not survive in ``dtype``.
    """
    facts = DTYPES.get(dtype)
    if facts is None:
        raise TypeError(f"Quantization takes float16, bfloat16, float32 or float64 tensors, got {dtype}.")
    need, low, high = fmt.demands(facts)
    if need > facts.significand or low < facts.lowest or high > facts.highest:
        raise ValueError(
            f"{fmt} is wider than {dtype}: it needs {need} significand bits and exponents {low} to {high}, the dtype "
            f"has {facts.significand} and {facts.lowest} to {facts.highest}. Use a narrower format or a wider dtype."
        )


def with_word_length(fmt: NumberFormat, word_length: int) -> NumberFormat:
    """Copy of a fixed or block format with another word length (range of a fixed point kept).

    Args:
        fmt: A fixed or block format.
        word_length: Bits of a code, sign included.

    Returns:
        The copy.

    Raises:
        TypeError: If the format has no word length to change.
    """
    other = fmt.with_word_length(word_length)
    if other is None:
        raise TypeError(f"{fmt} has no word length to change.")
    return other
