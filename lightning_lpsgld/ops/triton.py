"""Fused CUDA kernels in Triton: every op reads its tensor once and writes it once.

The kernels are in :mod:`.triton_kernels` and :mod:`.triton_step`, imported when the first one runs: importing this
module does not import Triton. With ``TRITON_INTERPRET=1`` in the environment they run on CPU tensors in Triton's
interpreter (slow, for tests).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import reference
from lightning_lpsgld.ops.carry import carry_seed
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.spec import StepSpec
from lightning_lpsgld.ops.triton_launch import Start
from lightning_lpsgld.ops.triton_layout import (
    ELEMENT,
    FAMILIES,
    KEPT,
    LONG_ROW,
    NOTHING,
    Rows,
    Tile,
    facts,
    identity_of,
    root_bits,
    rows_of,
    signed64,
    tile_of,
)
from lightning_lpsgld.random import DrawKey

__all__ = [
    "Rows",
    "decode",
    "encode",
    "facts",
    "langevin_steps_",
    "quantize",
    "quantize_variance_corrected",
    "refusal",
    "rows_of",
    "tile_of",
    "unavailable",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_KEY = DrawKey(0)


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
    if op == "langevin_steps_" and not x.is_contiguous():
        return "the fused step takes contiguous parameters."
    return _shape_refusal(x.shape, tuple(formats))


@lru_cache(KEPT)
def _shape_refusal(shape: tuple[int, ...], formats: tuple[NumberFormat, ...]) -> str | None:
    for fmt in formats:
        if fmt.family not in FAMILIES:
            return f"no Triton kernel has {'the scales of ' if fmt.blocks.shared else ''}{fmt} built in."
        if rows_of(shape, fmt) is None:
            return f"the Triton kernels have no blocks of {fmt} for a tensor of shape {tuple(shape)}."
    blocks = {rows_of(shape, fmt) for fmt in formats if fmt.blocks.shared}
    if len(blocks) > 1:
        return "the fused step needs the same blocks for weights and gradients."
    return None


def _kernels() -> Any:
    from lightning_lpsgld.ops import triton_kernels

    return triton_kernels


class _Cut(NamedTuple):
    """How the kernels of one op cut tensors of one shape, and the first of them: for long rows, the one of the keys."""

    rows: Rows
    tile: Tile
    aligned: bool
    keys: Start | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.rows.count, self.rows.length, self.tile.chunks

    @property
    def meta(self) -> dict[str, Any]:
        tile = self.tile
        cut = {"SHARED": self.rows.shared, "R": tile.rows, "Q": tile.quads, "ALIGNED": self.aligned}
        return {**cut, "num_warps": tile.warps}

    def find_keys(self, x: Tensor, offset: int) -> Tensor:
        """Largest key of each long row (one more kernel, which reads the tensor); else a tensor that is not used."""
        if self.keys is None:
            return x
        keys = torch.zeros(self.rows.count, dtype=torch.int64, device=x.device)
        self.keys(x, keys, *self.sizes, offset)
        return keys


#: What decides how kernels of an op run on a tensor: shape, dtype, device, whether the address takes vector moves, and
#: whether the first element begins a quad of draws.
_Layout = tuple[torch.Size, torch.dtype, torch.device, bool, bool]


def _layout(x: Tensor, offset: int) -> _Layout:
    return x.shape, x.dtype, x.device, x.data_ptr() % 16 == 0, offset % 4 == 0


def _cut(fmt: NumberFormat, layout: _Layout) -> _Cut:
    shape, _, device, at_vector, at_quad = layout
    rows = rows_of(shape, fmt)
    assert rows is not None  # refusal() was asked
    aligned = rows.length % 4 == 0 and at_vector and at_quad
    tile, keys = tile_of(rows, aligned), None
    if rows.shared == LONG_ROW:
        meta = {"Q": tile.quads, "ALIGNED": aligned, "num_warps": tile.warps}
        keys = Start(_kernels().row_keys_kernel, tile.programs, device, meta)
    return _Cut(rows, tile, aligned, keys)


def _draws(key: DrawKey | None) -> tuple[int, int, int, int, int]:
    key = key or _NO_KEY
    return key.offset, signed64(key.seed), key.step, key.stream, signed64(carry_seed(key.seed))


def _in_layout_of(out: Tensor, x: Tensor) -> Tensor:
    """A contiguous result in the memory format of ``x``: channels-last in, channels-last out."""
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)


def _passes(rows: Rows, fmt: NumberFormat, rounding: str) -> tuple[bool, ...]:
    """Of a kernel that rounds: before the last, one that only notes which long rows pass the top."""
    return (True, False) if rows.shared == LONG_ROW and rounding == "stochastic" and _carries(fmt) else (False,)


def _carries(fmt: NumberFormat) -> bool:
    return identity_of(fmt, torch.float32).carries


@lru_cache(KEPT)
def _rounding(fmt: NumberFormat, rounding: str, layout: _Layout) -> tuple[_Cut, tuple[Start, ...]]:
    """The kernels of :func:`quantize`."""
    cut, kernel = _cut(fmt, layout), _kernels().quantize_kernel
    meta = {**facts(fmt, layout[1]), "STOCHASTIC": rounding == "stochastic", **cut.meta}
    starts = [
        Start(kernel, cut.tile.programs, layout[2], {**meta, "LEVELS": levels})
        for levels in _passes(cut.rows, fmt, rounding)
    ]
    return cut, tuple(starts)


def quantize(x: Tensor, fmt: NumberFormat, rounding: Literal["nearest", "stochastic"], key: DrawKey | None) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize`; the same bits as the reference."""
    draws, source = _draws(key), x.contiguous()
    cut, starts = _rounding(fmt, rounding, _layout(source, draws[0]))
    out = torch.empty_like(source)
    keys = cut.find_keys(source, draws[0])
    for start in starts:
        start(source, out, keys, *cut.sizes, *draws)
    return _in_layout_of(out, x)


@lru_cache(KEPT)
def _correcting(fmt: NumberFormat, each: bool, at: bool, layout: _Layout) -> tuple[_Cut, tuple[Start, ...]]:
    """The kernels of :func:`quantize_variance_corrected`; ``at``: the variances' address is a multiple of 16."""
    cut, kernel = _cut(fmt, layout), _kernels().vc_kernel
    meta = {**facts(fmt, layout[1]), "PER_ELEMENT": each, **cut.meta}
    starts = [
        Start(kernel, cut.tile.programs, layout[2], {**meta, "LEVELS": levels})
        for levels in _passes(cut.rows, fmt, "stochastic")
    ]
    return cut, tuple(starts)


def quantize_variance_corrected(mean: Tensor, variance: float | Tensor, fmt: NumberFormat, key: DrawKey) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize_variance_corrected`; its thresholds are float32."""
    draws, each, source = _draws(key), isinstance(variance, Tensor), mean.contiguous()
    spread, bits = source, 0
    if isinstance(variance, Tensor):
        rows = rows_of(mean.shape, fmt)
        if rows is not None and rows.shared == LONG_ROW:
            return reference.quantize_variance_corrected(mean, variance, fmt, key)
        spread = variance.expand(mean.shape).contiguous()
    else:
        bits = root_bits(float(variance))
    cut, starts = _correcting(fmt, each, spread.data_ptr() % 16 == 0, _layout(source, draws[0]))
    out = torch.empty_like(source)
    keys = cut.find_keys(source, draws[0])
    for start in starts:
        start(source, spread, out, keys, bits, *cut.sizes, *draws)
    return _in_layout_of(out, mean)


@lru_cache(KEPT)
def _encoding(fmt: NumberFormat, rounding: str, layout: _Layout) -> tuple[_Cut, Start | None, Start]:
    """The kernels of :func:`encode`: for long rows that may be carried, one that says which are; that which encodes."""
    cut, dtype, device, kernels = _cut(fmt, layout), layout[1], layout[2], _kernels()
    meta = {**facts(fmt, dtype), "STOCHASTIC": rounding == "stochastic", **cut.meta}
    bits = {
        "BITS": fmt.bits, "TOP": identity_of(fmt, dtype).top_pattern, "WIDTH": torch.iinfo(fmt.code_dtype).bits,
    }  # fmt: skip
    before = None
    if len(_passes(cut.rows, fmt, rounding)) > 1:
        before = Start(kernels.quantize_kernel, cut.tile.programs, device, {**meta, "LEVELS": True})
    return cut, before, Start(kernels.encode_kernel, cut.tile.programs, device, {**meta, **bits})


def encode(x: Tensor, fmt: NumberFormat, rounding: Literal["nearest", "stochastic"], key: DrawKey | None) -> Encoded:
    """See :func:`lightning_lpsgld.ops.encode`; waits for the device once, to see whether there was a NaN."""
    draws, source = _draws(key), x.contiguous()
    cut, before, start = _encoding(fmt, rounding, _layout(source, draws[0]))
    codes = torch.empty_like(source, dtype=fmt.code_dtype)
    missing = torch.zeros((), dtype=torch.int32, device=x.device)
    exponents = None
    if fmt.blocks.shared:
        low, _ = fmt.exponent_range(x.dtype)
        exponents = torch.full(fmt.blocks.compact(x.shape), low, dtype=torch.int8, device=x.device)
    keys = cut.find_keys(source, draws[0])
    if before is not None:
        before(source, codes, keys, *cut.sizes, *draws)
    start(source, codes, codes if exponents is None else exponents, missing, keys, *cut.sizes, *draws)
    if not _has_nan(fmt) and (count := int(missing)):
        raise ValueError(f"encode: {fmt} has no NaN, but {count} of {x.numel()} elements are NaN.")
    return Encoded(codes, exponents, fmt)


@lru_cache(KEPT)
def _has_nan(fmt: NumberFormat) -> bool:
    return identity_of(fmt, torch.float32).has_nan


@lru_cache(KEPT)
def _decoding(fmt: NumberFormat, dtype: torch.dtype, at: bool, layout: _Layout) -> tuple[tuple[int, int, int], Start]:
    """The kernel of :func:`decode` and its sizes; ``at``: the exponents' address is a multiple of 16."""
    rows = rows_of(layout[0], fmt)
    assert rows is not None
    flat = rows if rows.shared in (NOTHING, ELEMENT) else Rows(LONG_ROW, rows.count, rows.length)
    aligned = flat.length % 4 == 0 and layout[3]
    tile, numbers, kernel = tile_of(flat, aligned), facts(fmt, dtype), identity_of(fmt, dtype)
    meta = {
        **{name: numbers[name] for name in ("KIND", "OFFSET", "LOW", "CMAX")}, "SHARED": flat.shared, "Q": tile.quads,
        "ALIGNED": aligned, "BITS": fmt.bits,
        "EXPONENT_BITS": kernel.exponent_bits, "HAS_NAN": kernel.has_nan, "num_warps": tile.warps,
    }  # fmt: skip
    start = Start(_kernels().decode_kernel, tile.programs, layout[2], meta)
    return (flat.count, flat.length, tile.chunks), start


def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """See :func:`lightning_lpsgld.ops.decode`; float64 is left to the reference."""
    if dtype not in _DTYPES:
        return reference.decode(encoded, dtype)
    codes = encoded.codes.contiguous()
    exponents = codes if encoded.exponents is None else encoded.exponents.contiguous()
    sizes, start = _decoding(encoded.format, dtype, exponents.data_ptr() % 16 == 0, _layout(codes, 0))
    out = torch.empty_like(codes, dtype=dtype)
    start(codes, exponents, out, *sizes)
    return out


def langevin_steps_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor] | None,
    spec: StepSpec,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
) -> Tensor:
    """One step of many tensors in a few launches; see :mod:`.triton_step`."""
    from lightning_lpsgld.ops import triton_step

    return triton_step.langevin_steps_(params, grads, accumulators, spec, keys, indices)
