"""Codes of fewer than eight bits side by side: how they lie in a file."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_packed", "packed_codes", "packed_size", "unpacked_codes"]


def is_packed(bits: int) -> bool:
    """Whether codes of so many bits are stored packed: those that leave room in a byte."""
    return bits < 8


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` codes."""
    return (count * bits + 7) // 8


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes one after the other, lowest bit first; code i begins at bit ``i * bits``.

    Args:
        codes: int8, any shape; row-major order counts. Of negative ones the two's complement is kept.
        bits: Of a code, 1 to 7.

    Returns:
        uint8, one dim of :func:`packed_size` bytes; bits after the last code are zero.

    Example:
        >>> packed_codes(torch.tensor([1, -1, 7], dtype=torch.int8), 4).tolist()
        [241, 7]
    """
    flat = codes.contiguous().reshape(-1)
    count = flat.numel()
    eights = torch.zeros((count + 7) // 8, 8, dtype=torch.int64)
    eights.view(-1)[:count] = flat
    eights &= 2**bits - 1
    words = (eights << (bits * torch.arange(8))).sum(dim=1, keepdim=True)  # at most 56 bits
    return ((words >> (8 * torch.arange(bits))) & 255).to(torch.uint8).reshape(-1)[: packed_size(count, bits)].clone()


def unpacked_codes(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """Inverse of :func:`packed_codes`.

    Args:
        packed: What that returned.
        bits: Of a code.
        shape: Of the codes.
        signed: Whether codes may be negative.

    Returns:
        int8 of ``shape``.

    Raises:
        ValueError: If ``packed`` is not uint8, has another size, or has bits after the last code.
    """
    count = torch.Size(shape).numel()
    size = packed_size(count, bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise ValueError(
            f"{count} codes of {bits} bits are {size} bytes (uint8), got {packed.dtype} of shape {tuple(packed.shape)}."
        )
    groups = torch.zeros((count + 7) // 8, bits, dtype=torch.int64)
    groups.view(-1)[:size] = packed
    words = (groups << (8 * torch.arange(bits))).sum(dim=1, keepdim=True)
    codes = ((words >> (bits * torch.arange(8))) & (2**bits - 1)).reshape(-1)
    if bool(codes[count:].any()):
        raise ValueError(f"There are bits after the last of {count} packed codes.")
    codes = codes[:count]
    if signed:
        codes = codes - ((codes >> (bits - 1)) << bits)
    return codes.to(torch.int8).reshape(shape)
