"""Codes of fewer than eight bits side by side: how they lie in memory, in files and on the wire.

Eight codes, a byte each, are one word of 64 bits, and eight packed ones are as many bytes as a code has bits: three
moves close the gaps between them (of two codes, of four, of eight), and three open them again. Words are made of bytes
as little-endian machines do. This is the definition, for tensors of any device; ``ops/packing.py`` has a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["check_packed", "is_packed", "packed_codes", "packed_size", "unpacked_codes"]


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
    flat = codes.contiguous().view(-1)
    count = flat.numel()
    eights = flat.new_zeros((count + 7) // 8, 8)
    eights.view(-1)[:count] = flat
    words = eights.view(torch.int64).squeeze(1) & _repeated(2**bits - 1, 8)
    for low, shift, width in _moves(bits):
        words = (words & _repeated(low, width)) | ((words >> shift) & _repeated(low << low.bit_length(), width))
    packed = torch.empty(len(words), bits, dtype=torch.uint8, device=codes.device)
    packed.copy_(words.view(torch.uint8).view(-1, 8)[:, :bits])
    size = packed_size(count, bits)
    return packed.view(-1) if packed.numel() == size else packed.view(-1)[:size].clone()


def unpacked_codes(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """Inverse of :func:`packed_codes`, of what :func:`check_packed` would let pass.

    Args:
        packed: What that returned.
        bits: Of a code.
        shape: Of the codes.
        signed: Whether codes may be negative.

    Returns:
        int8 of ``shape``.
    """
    count = torch.Size(shape).numel()
    groups = packed.new_zeros((count + 7) // 8, 8)
    whole = count // 8
    groups[:whole, :bits] = packed[: whole * bits].view(-1, bits)
    if whole < len(groups):
        rest = packed[whole * bits :]
        groups[whole, : len(rest)] = rest
    words = groups.view(torch.int64).squeeze(1)
    for low, shift, width in reversed(list(_moves(bits))):
        words = (words & _repeated(low, width)) | ((words & _repeated(low << low.bit_length(), width)) << shift)
    if signed:
        sign, tops = _repeated(1 << (bits - 1), 8), _repeated(128, 8)  # no byte borrows from the next
        words = (((words ^ sign) | tops) - sign) ^ tops
    return words.view(torch.int8)[:count].reshape(shape)


def check_packed(packed: Tensor, bits: int, count: int) -> None:
    """Refuse what :func:`packed_codes` would not have returned for ``count`` codes.

    Raises:
        ValueError: If ``packed`` is not uint8, has another size, or has bits after the last code.
    """
    size = packed_size(count, bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise ValueError(
            f"{count} codes of {bits} bits are {size} bytes (uint8), got {packed.dtype} of shape {tuple(packed.shape)}."
        )
    used = count * bits % 8
    if used and int(packed[-1]) >> used:
        raise ValueError(f"There are bits after the last of {count} packed codes.")


def _moves(bits: int) -> Iterator[tuple[int, int, int]]:
    """Of each move: the lower of two neighbours, by how much the upper one comes down, and bits of the two's place."""
    for together in (1, 2, 4):
        yield 2 ** (together * bits) - 1, together * (8 - bits), 16 * together


def _repeated(pattern: int, width: int) -> int:
    """A pattern in every ``width`` bits of a word, as a signed number."""
    word = sum(pattern << at for at in range(0, 64, width))
    return word - 2**64 if word >= 2**63 else word
