"""Which tensors hold neither NaN nor infinities: one pass over all of them, as fast as memory gives them.

A kernel of :mod:`.cpu`'s library; bits of exponents are compared, so nothing overflows and no sum is taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lpsgld.ops.cpu_library import load

__all__ = ["finite_flags", "readable"]

#: Numbers of the dtypes in ``cpu.cpp``.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_IN_ONE_PIECE = {4: torch.channels_last, 5: torch.channels_last_3d}


def readable(x: Tensor) -> bool:
    """Whether the kernel is there and can read ``x`` where it lies: plain, on a CPU, without gaps between elements."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in _DTYPES or load()[1] is not None:
        return False
    order = _IN_ONE_PIECE.get(x.ndim)
    return x.is_contiguous() or (order is not None and x.is_contiguous(memory_format=order))


def finite_flags(tensors: Sequence[Tensor]) -> Tensor:
    """Which of ``tensors``, all of them :func:`readable`, are finite throughout.

    Args:
        tensors: Any shapes and floating dtypes; an empty one is finite.

    Returns:
        bool tensor of shape ``(len(tensors),)``.

    Example:
        >>> finite_flags([torch.ones(3), torch.tensor([1.0, torch.nan])]).tolist()
        [True, False]
    """
    count, tensors = len(tensors), tensors[::-1]  # what a step reads first is read last, and then in the cache
    flags = torch.ones(count, dtype=torch.bool)
    load()[0].lpsgld_finite(
        (ctypes.c_void_p * count)(*(x.data_ptr() for x in tensors)),
        (ctypes.c_int64 * count)(*(x.numel() for x in tensors)),
        (ctypes.c_int32 * count)(*(_DTYPES[x.dtype] for x in tensors)),
        ctypes.c_void_p(flags.data_ptr()),
        count,
        torch.get_num_threads(),
    )
    return flags.flip(0)
