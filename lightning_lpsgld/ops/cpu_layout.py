"""How tensors, formats and draws are told to the fused CPU kernels."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops.carry import carry_key, hole_key
from lightning_lpsgld.ops.cpu_library import Format, Key
from lightning_lpsgld.random import DrawKey

__all__ = [
    "FAMILIES",
    "MODES",
    "Memory",
    "aligned_with",
    "layout_of",
    "mark_written",
    "native_format",
    "native_key",
    "pointer",
    "run_length",
]

_CHANNELS_MAX = 8192
_NO_KEY = DrawKey(seed=0)


def run_length(shape: torch.Size, fmt: NumberFormat | None) -> int:
    """Elements of a block, 0 where nothing is shared; -1 where a block is no contiguous run of that length.

    0 of floats that share a scale, too: their runs, of which the last of a row may be shorter, are told by the format.
    """
    length = 0 if fmt is None or fmt.family == "scaled" else fmt.blocks.run_length(shape)
    return -1 if length is None else 0 if length == 1 else length


#: What the kernels can: families of formats, by their numbers in ``cpu.cpp``.
FAMILIES: dict[str | None, int] = {"fixed": 0, "block": 1, "float": 2, "scaled": 3}
#: Roundings and accumulations, by their numbers there.
MODES = {"nearest": 0, "stochastic": 1, "naive": 1, "full": 1, "vc": 2, "float": 3}


@lru_cache(maxsize=256)
def native_format(fmt: NumberFormat | None, dtype: torch.dtype, saturate: bool = True) -> Format:
    """A format of one of :data:`FAMILIES` for tensors of ``dtype``; without ``saturate`` values have no ends.

    ``None`` gives an empty one, which no kernel reads.
    """
    if fmt is None:
        return Format()
    kernel = fmt.kernel(dtype)
    assert kernel is not None  # refusal() was asked
    ends = (kernel.min, kernel.max) if saturate else (-math.inf, math.inf)
    codes = (kernel.code_min, kernel.code_max)
    fields = (kernel.mantissa_bits, kernel.bias, fmt.bits, 2 ** (fmt.bits - 1) - 1, kernel.carries)
    scales = (kernel.run, kernel.scale_low, kernel.scale_high, kernel.fits, kernel.hole)
    return Format(FAMILIES[fmt.family], kernel.offset, kernel.low, kernel.high, *codes, *ends, *fields, *scales)


def native_key(key: DrawKey | None, stream: int | None = None) -> Key:
    """Name of the draws (any, where none are made), of another stream if one is given."""
    key = key or _NO_KEY
    return Key(key.seed, key.offset, *_seeds_of_coins(key.seed), key.step, key.stream if stream is None else stream)


@lru_cache(maxsize=256)
def _seeds_of_coins(seed: int) -> tuple[int, int]:
    return carry_key(DrawKey(seed)).seed, hole_key(DrawKey(seed)).seed


def layout_of(x: Tensor, *formats: NumberFormat | None) -> tuple[int, int] | None:
    """(0, 0) for row-major memory, (channels, pixels) for channels-last, ``None`` for anything else."""
    if x.is_contiguous():
        return 0, 0
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or not x.is_contiguous(memory_format=last) or x.shape[1] > _CHANNELS_MAX:
        return None
    if any(fmt is not None and not fmt.blocks.any_order for fmt in formats):
        return None
    return x.shape[1], x.shape[2:].numel()


def pointer(x: Tensor) -> ctypes.c_void_p:
    """Address of the first element."""
    return ctypes.c_void_p(x.data_ptr())


def mark_written(x: Tensor) -> None:
    """Tell autograd that ``x`` was changed behind its back."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def aligned_with(x: Tensor, like: Tensor) -> Tensor:
    """``x`` as float32 in the memory order of ``like``; itself where that is so already."""
    if x.dtype == torch.float32 and x.stride() == like.stride() and not x.is_neg():
        return x
    return torch.empty_like(like).copy_(x)


class Memory:
    """What a kernel reads and writes until it is done, and the copies of tensors in another memory order."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []
        self._changed: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def order_of(self, param: Tensor, *formats: NumberFormat | None) -> tuple[Tensor, tuple[int, int]]:
        """A tensor in the memory order that the kernel takes a weight in, and :func:`layout_of` it."""
        layout = layout_of(param, *formats)
        if layout is not None and not param.is_neg():
            return param.detach(), layout
        return torch.empty(param.shape), (0, 0)

    def address(self, x: Tensor | None, like: Tensor, *, written: bool = True) -> int | None:
        """Of the elements of ``x`` in the memory order of ``like``."""
        if x is None:
            return None
        work = aligned_with(x, like)
        self._alive.append(work)
        if written:
            self._changed.append(x)
            if work is not x:
                self._copies.append((x, work))
        return work.data_ptr()

    def finish(self) -> None:
        """Bring changed copies back, and tell autograd."""
        with torch.no_grad():
            for target, result in self._copies:
                target.copy_(result)
        for x in self._changed:
            mark_written(x)
