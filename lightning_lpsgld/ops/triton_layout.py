"""How the Triton kernels see tensors and formats: rows, tiles, and numbers known at compile time. Imports no Triton."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.formats import KernelIdentity, NumberFormat

__all__ = [
    "ELEMENT",
    "FAMILIES",
    "KEPT",
    "LONGEST_ROW",
    "LONG_ROW",
    "NOTHING",
    "ROW",
    "Rows",
    "Tile",
    "facts",
    "identity_of",
    "is_aligned",
    "root_bits",
    "rows_of",
    "signed64",
    "tile_of",
]

#: Longest row that one program holds in registers; longer rows are reduced by a kernel of their own first.
LONGEST_ROW = 8192
_CHUNK = 1024
#: ``SHARED`` of the kernels: where exponents come from (see :mod:`.triton_kernels`).
NOTHING, ELEMENT, ROW, LONG_ROW = 0, 1, 2, 3
#: Plans and answers of so many layouts are kept for every op; those of a network are a few hundred.
KEPT = 4096


@dataclass(frozen=True)
class Rows:
    """A tensor as rows of contiguous elements that share an exponent."""

    shared: int
    count: int
    length: int


@lru_cache(KEPT)
def rows_of(shape: tuple[int, ...], fmt: NumberFormat | None) -> Rows | None:
    """Row structure of a contiguous tensor under ``fmt``, or ``None`` where blocks are not contiguous."""
    size = math.prod(shape)
    if fmt is None or not fmt.blocks.shared:
        return Rows(NOTHING, 1, size)
    length = fmt.blocks.run_length(shape)
    if length is None:
        return None
    if length <= 1:
        return Rows(ELEMENT, 1, size)
    return Rows(ROW if length <= LONGEST_ROW else LONG_ROW, size // length, length)


#: What the kernels can: families of formats, by their numbers in :mod:`.triton_device`.
FAMILIES: dict[str | None, int] = {"fixed": 1, "block": 2, "float": 3}


def facts(fmt: NumberFormat, dtype: torch.dtype) -> dict[str, Any]:
    """The seven compile-time numbers of a format (see :mod:`.triton_device`)."""
    kernel = identity_of(fmt, dtype)
    ends = (kernel.min, kernel.max) if fmt.family == "float" else (float(kernel.code_min), float(kernel.code_max))
    numbers = (FAMILIES[fmt.family], kernel.offset, kernel.low, kernel.high, *ends, kernel.carries)
    return dict(zip(("KIND", "OFFSET", "LOW", "HIGH", "CMIN", "CMAX", "CARRY"), numbers))


def identity_of(fmt: NumberFormat, dtype: torch.dtype) -> KernelIdentity:
    """What the kernels are told of a format that :func:`refusal` let through."""
    kernel = fmt.kernel(dtype)
    assert kernel is not None
    return kernel


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts a tensor: rows and quads of a program, programs, chunks of a row, warps."""

    rows: int
    quads: int
    chunks: int
    programs: int
    warps: int


def tile_of(rows: Rows, aligned: bool) -> Tile:
    """Tile for a row structure: 8 elements a thread, so that the step's kernels stay below 64 registers or so."""
    window = rows.length + (0 if aligned else 3)
    if rows.shared == ROW:
        quads = 1 << max(-(-window // 4) - 1, 0).bit_length()
        together = max(1, _CHUNK // (4 * quads))
        return Tile(together, quads, 1, -(-rows.count // together), max(4, quads // 64))
    chunks = -(-window // _CHUNK)
    return Tile(1, _CHUNK // 4, chunks, rows.count * chunks, 4)


def is_aligned(rows: Rows, offset: int, *tensors: Tensor) -> bool:
    """Whether quads of draws are quads of memory in every row, at addresses that take vector moves."""
    return rows.length % 4 == 0 and offset % 4 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def signed64(value: int) -> int:
    """Two's complement of an unsigned 64-bit number: kernels take their integers as int64."""
    return value - 2**64 if value >= 2**63 else value


def root_bits(variance: float) -> int:
    """The standard deviation's float64 bits, as an int64 (Triton would pass a float as float32)."""
    bits: int = struct.unpack("<q", struct.pack("<d", math.sqrt(variance)))[0]
    return bits
