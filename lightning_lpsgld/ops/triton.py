"""Fused CUDA kernels in Triton: every op reads its tensor once and writes it once.

The kernels are in :mod:`.triton_kernels` and :mod:`.triton_step`, imported when the first one runs: importing this
module does not import Triton. With ``TRITON_INTERPRET=1`` in the environment they run on CPU tensors in Triton's
interpreter (slow, for tests).
"""

from __future__ import annotations

import importlib.util
import math
import os
import struct
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import (
    BlockFloatingPoint,
    FixedPoint,
    FloatingPoint,
    MicroscalingFloat,
    NumberFormat,
    block_exponent_range,
    code_dtype,
)
from lightning_lpsgld.ops import reference
from lightning_lpsgld.ops.blocks import exponents_shape
from lightning_lpsgld.ops.carry import carry_key
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.spec import StepSpec
from lightning_lpsgld.random import DrawKey

__all__ = [
    "Rows",
    "decode",
    "encode",
    "facts",
    "langevin_step_",
    "launch",
    "quantize",
    "quantize_variance_corrected",
    "refusal",
    "rows_of",
    "tile_of",
    "unavailable",
]

#: Longest row that one program holds in registers; longer rows are reduced by a kernel of their own first.
LONGEST_ROW = 8192
_CHUNK = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_KEY = DrawKey(0)
#: ``SHARED`` of the kernels: where exponents come from (see :mod:`.triton_kernels`).
NOTHING, ELEMENT, ROW, LONG_ROW = 0, 1, 2, 3


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable() -> str | None:
    """Reason why Triton's kernels cannot run in this process, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's CUDA builds for Linux)."
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device."
    if torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need compute capability 8.0 or later."
    return None


def refusal(op: str, x: Tensor, formats: Sequence[NumberFormat]) -> str | None:
    """Reason why this backend does not take the call, or ``None``."""
    if not x.is_cuda and not (_interpreted() and x.device.type == "cpu"):
        return f"the Triton kernels run on CUDA tensors, got {x.device}."
    if op != "decode" and x.dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, got {x.dtype}."
    if op == "langevin_step_" and not x.is_contiguous():
        return "the fused step takes contiguous parameters."
    for fmt in formats:
        if isinstance(fmt, MicroscalingFloat):
            return f"no Triton kernel has the scales of {fmt} built in."
        if rows_of(x.shape, fmt) is None:
            return f"the Triton kernels have no blocks of {fmt} for a tensor of shape {tuple(x.shape)}."
    blocks = {rows_of(x.shape, fmt) for fmt in formats if isinstance(fmt, BlockFloatingPoint)}
    if len(blocks) > 1:
        return "the fused step needs the same blocks for weights and gradients."
    return None


@dataclass(frozen=True)
class Rows:
    """A tensor as rows of contiguous elements that share an exponent."""

    shared: int
    count: int
    length: int


def rows_of(shape: Sequence[int], fmt: NumberFormat | None) -> Rows | None:
    """Row structure of a contiguous tensor under ``fmt``, or ``None`` where blocks are not contiguous."""
    shape, size = tuple(shape), math.prod(shape)
    if not isinstance(fmt, BlockFloatingPoint):
        return Rows(NOTHING, 1, size)
    if fmt.block_size is not None and shape:
        if shape[-1] % fmt.block_size:
            return None
        length = fmt.block_size
    elif fmt.block_dim is None or not shape:
        length = size
    elif not -len(shape) <= fmt.block_dim < len(shape) or fmt.block_dim % len(shape) != 0:
        return None
    else:
        length = size // max(shape[0], 1)
    if length <= 1:
        return Rows(ELEMENT, 1, size)
    return Rows(ROW if length <= LONGEST_ROW else LONG_ROW, size // length, length)


def facts(fmt: NumberFormat, dtype: torch.dtype) -> dict[str, Any]:
    """The seven compile-time numbers of a format (see :mod:`.triton_device`)."""
    carry = _carries(fmt)
    if isinstance(fmt, FixedPoint):
        numbers: tuple[Any, ...] = (1, -fmt.fraction_length, 0, 0, float(fmt.code_min), float(fmt.code_max))
    elif isinstance(fmt, BlockFloatingPoint):
        low, high = block_exponent_range(fmt, dtype)
        numbers = (2, 2 - fmt.word_length, low, high, float(fmt.code_min), float(fmt.code_max))
    else:
        numbers = (3, -fmt.mantissa_bits, fmt.exponent_min, fmt.exponent_max, fmt.min, fmt.max)
    return dict(zip(("KIND", "OFFSET", "LOW", "HIGH", "CMIN", "CMAX", "CARRY"), (*numbers, carry)))


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


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **meta: Any) -> None:
    """Start a kernel of ``programs`` programs on the device of its tensors; nothing for an empty tensor."""
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*args, **meta)


def _kernels() -> Any:
    from lightning_lpsgld.ops import triton_kernels

    return triton_kernels


@dataclass(frozen=True)
class _Job:
    """What the kernels of one tensor have in common."""

    x: Tensor
    rows: Rows
    aligned: bool
    tile: Tile
    keys: Tensor  # largest key of each long row, else unused

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.rows.count, self.rows.length, self.tile.chunks

    @property
    def meta(self) -> dict[str, Any]:
        tile = self.tile
        cut = {"SHARED": self.rows.shared, "R": tile.rows, "Q": tile.quads, "ALIGNED": self.aligned}
        return {**cut, "num_warps": tile.warps}


def _job(x: Tensor, fmt: NumberFormat, offset: int) -> _Job:
    """Contiguous tensor, its tiling, and for long rows the keys (one more kernel, which reads the tensor)."""
    x = x.contiguous()
    rows = rows_of(x.shape, fmt)
    assert rows is not None  # refusal() was asked
    aligned = is_aligned(rows, offset, x)
    tile, keys = tile_of(rows, aligned), x
    if rows.shared == LONG_ROW:
        keys = torch.zeros(rows.count, dtype=torch.int64, device=x.device)
        sizes = (rows.count, rows.length, tile.chunks, offset)
        meta = {"Q": tile.quads, "ALIGNED": aligned, "num_warps": tile.warps}
        launch(_kernels().row_keys_kernel, tile.programs, x.device, x, keys, *sizes, **meta)
    return _Job(x, rows, aligned, tile, keys)


def _draws(key: DrawKey | None) -> tuple[int, int, int, int, int]:
    key = key or _NO_KEY
    return key.offset, signed64(key.seed), key.step, key.stream, signed64(carry_key(key).seed)


def _in_layout_of(out: Tensor, x: Tensor) -> Tensor:
    """A contiguous result in the memory format of ``x``: channels-last in, channels-last out."""
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)


def quantize(x: Tensor, fmt: NumberFormat, rounding: Literal["nearest", "stochastic"], key: DrawKey | None) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize`; the same bits as the reference."""
    draws = _draws(key)
    job = _job(x, fmt, draws[0])
    out = torch.empty_like(job.x)
    for levels in _passes(job, fmt, rounding):
        _quantize(job, out, fmt, rounding, draws, levels)
    return _in_layout_of(out, x)


def _passes(job: _Job, fmt: NumberFormat, rounding: str) -> tuple[bool, ...]:
    """Of a kernel that rounds: before the last, one that only notes which long rows pass the top."""
    return (True, False) if job.rows.shared == LONG_ROW and rounding == "stochastic" and _carries(fmt) else (False,)


def _carries(fmt: NumberFormat) -> bool:
    return isinstance(fmt, BlockFloatingPoint) and fmt.top == "carry"


def _quantize(job: _Job, out: Tensor, fmt: NumberFormat, rounding: str, draws: tuple[int, ...], levels: bool) -> None:
    launch(
        _kernels().quantize_kernel, job.tile.programs, job.x.device, job.x, out, job.keys, *job.sizes, *draws,
        **facts(fmt, job.x.dtype), STOCHASTIC=rounding == "stochastic", LEVELS=levels, **job.meta,
    )  # fmt: skip


def quantize_variance_corrected(mean: Tensor, variance: float | Tensor, fmt: NumberFormat, key: DrawKey) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize_variance_corrected`; its thresholds are float32."""
    draws = _draws(key)
    rows = rows_of(mean.shape, fmt)
    spread = variance if isinstance(variance, Tensor) else None
    if spread is not None and rows is not None and rows.shared == LONG_ROW:
        return reference.quantize_variance_corrected(mean, variance, fmt, key)
    job = _job(mean, fmt, draws[0])
    out = torch.empty_like(job.x)
    if spread is None:
        spread, bits = job.x, root_bits(float(variance))
    else:
        spread, bits = spread.expand(mean.shape).contiguous(), 0
    for levels in _passes(job, fmt, "stochastic"):
        launch(
            _kernels().vc_kernel, job.tile.programs, mean.device,
            job.x, spread, out, job.keys, bits, *job.sizes, *draws,
            **facts(fmt, mean.dtype), PER_ELEMENT=isinstance(variance, Tensor), LEVELS=levels, **job.meta,
        )  # fmt: skip
    return _in_layout_of(out, mean)


def encode(x: Tensor, fmt: NumberFormat, rounding: Literal["nearest", "stochastic"], key: DrawKey | None) -> Encoded:
    """See :func:`lightning_lpsgld.ops.encode`; waits for the device once, to see whether there was a NaN."""
    draws = _draws(key)
    job = _job(x, fmt, draws[0])
    codes = torch.empty_like(job.x, dtype=code_dtype(fmt))
    missing = torch.zeros((), dtype=torch.int32, device=x.device)
    block, exponents = isinstance(fmt, BlockFloatingPoint), None
    if isinstance(fmt, BlockFloatingPoint):
        low, _ = block_exponent_range(fmt, x.dtype)
        exponents = torch.full(exponents_shape(x.shape, fmt), low, dtype=torch.int8, device=x.device)
    top = 0 if isinstance(fmt, (FixedPoint, BlockFloatingPoint)) else _top_pattern(fmt)
    if len(_passes(job, fmt, rounding)) > 1:
        _quantize(job, codes, fmt, rounding, draws, levels=True)
    launch(
        _kernels().encode_kernel, job.tile.programs, x.device,
        job.x, codes, exponents if block else codes, missing, job.keys, *job.sizes, *draws,
        **facts(fmt, x.dtype), STOCHASTIC=rounding == "stochastic", **job.meta,
        BITS=fmt.bits, TOP=top, WIDTH=torch.iinfo(codes.dtype).bits,
    )  # fmt: skip
    has_nan = isinstance(fmt, FloatingPoint) and fmt.specials != "none"
    if not has_nan and (count := int(missing)):
        raise ValueError(f"encode: {fmt} has no NaN, but {count} of {x.numel()} elements are NaN.")
    return Encoded(codes, exponents, fmt)


def _top_pattern(fmt: Any) -> int:
    """Bit pattern of the largest finite value."""
    mantissa = 2**fmt.mantissa_bits - (2 if fmt.specials == "nan" else 1)
    return ((fmt.exponent_max + fmt.bias) << fmt.mantissa_bits) + mantissa


def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """See :func:`lightning_lpsgld.ops.decode`; float64 is left to the reference."""
    if dtype not in _DTYPES:
        return reference.decode(encoded, dtype)
    fmt, codes = encoded.format, encoded.codes.contiguous()
    rows = rows_of(codes.shape, fmt)
    assert rows is not None
    flat = rows if rows.shared in (NOTHING, ELEMENT) else Rows(LONG_ROW, rows.count, rows.length)
    aligned = is_aligned(flat, 0, codes)
    tile, out = tile_of(flat, aligned), torch.empty_like(codes, dtype=dtype)
    numbers = facts(fmt, dtype)
    exponents = codes if encoded.exponents is None else encoded.exponents.contiguous()
    floating = numbers["KIND"] == 3
    launch(
        _kernels().decode_kernel, tile.programs, codes.device,
        codes, exponents, out, flat.count, flat.length, tile.chunks,
        **{name: numbers[name] for name in ("KIND", "OFFSET", "LOW", "CMAX")}, SHARED=flat.shared, Q=tile.quads,
        ALIGNED=aligned, BITS=fmt.bits, EXPONENT_BITS=fmt.exponent_bits if floating else 0,  # type: ignore[union-attr]
        HAS_NAN=floating and fmt.specials != "none", num_warps=tile.warps,  # type: ignore[union-attr]
    )  # fmt: skip
    return out


def langevin_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor] | None,
    spec: StepSpec,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
) -> Tensor:
    """One step of many tensors in a few launches; see :mod:`.triton_step`."""
    from lightning_lpsgld.ops import triton_step

    return triton_step.langevin_step_(params, grads, accumulators, spec, keys, indices)
