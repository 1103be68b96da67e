"""Codes of fewer than eight bits side by side, by the fused kernel where there is one: all rooms pack by these two."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_lpsgld.formats.packing import packed_codes, packed_size, unpacked_codes
from lightning_lpsgld.ops.cpu_layout import pointer
from lightning_lpsgld.ops.cpu_library import load

__all__ = ["pack", "unpack"]


def _kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and load()[1] is None


def pack(codes: Tensor, bits: int) -> Tensor:
    """As :func:`~lightning_lpsgld.formats.packing.packed_codes`, bit for bit.

    Example:
        >>> pack(torch.tensor([1, -1, 7], dtype=torch.int8), 4).tolist()
        [241, 7]
    """
    if not _kernels(codes):
        return packed_codes(codes, bits)
    codes = codes.contiguous()
    count = codes.numel()
    packed = torch.empty(packed_size(count, bits), dtype=torch.uint8)
    load()[0].lpsgld_pack(pointer(codes), ctypes.c_int64(count), bits, pointer(packed), torch.get_num_threads())
    return packed


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """As :func:`~lightning_lpsgld.formats.packing.unpacked_codes`.

    Example:
        >>> unpack(torch.tensor([241, 7], dtype=torch.uint8), 4, (3,), signed=True)
        tensor([ 1, -1,  7], dtype=torch.int8)
    """
    if not _kernels(packed):
        return unpacked_codes(packed, bits, shape, signed=signed)
    packed = packed.contiguous()
    codes = torch.empty(shape, dtype=torch.int8)
    count, threads = ctypes.c_int64(codes.numel()), torch.get_num_threads()
    load()[0].lpsgld_unpack(pointer(packed), count, bits, signed, pointer(codes), threads)
    return codes
