"""Fused CPU kernels: the ops of :mod:`.reference` and the whole sampler step, vectorised and parallel.

The kernels are plain C++ behind a C interface (``cpu.cpp``), built with the package where a C++ compiler is present and
loaded with ctypes; nothing is compiled at run time. AVX2 and AVX-512 are chosen when the library is loaded, and every
instruction set gives the same bits. ``quantize``, ``encode`` and ``decode`` equal the reference bit for bit;
``quantize_variance_corrected`` and the step work in float32 where the reference works in float64, so that about one
element in 10^5 may land on the neighbouring grid point.

Environment variable ``LIGHTNING_LPSGLD_CPU``: ``0`` turns the backend off; ``baseline``, ``avx2`` or ``avx512`` limits
the instruction set. It is read once, when the backend is first asked for.

The number of threads is that of torch (``torch.set_num_threads``); small tensors run on the calling thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import FloatingPoint, NumberFormat
from lightning_lpsgld.ops import reference
from lightning_lpsgld.ops.cpu_layout import (
    FAMILIES,
    MODES,
    Memory,
    layout_of,
    mark_written,
    native_format,
    native_key,
    pointer,
    run_length,
)
from lightning_lpsgld.ops.cpu_library import Shape, Step, StepTensor, load
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.spec import StepSpec
from lightning_lpsgld.random import DrawKey, Role, stream_id

__all__ = [
    "decode",
    "decode_into",
    "decode_packed",
    "draw_beyond_range",
    "encode",
    "instruction_set",
    "langevin_steps_",
    "quantize",
    "quantize_variance_corrected",
    "refusal",
    "unavailable",
]

Rounding = Literal["nearest", "stochastic"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable() -> str | None:
    """Reason why this backend cannot run in this process, or ``None``."""
    return load()[1]


def instruction_set() -> str:
    """``"baseline"``, ``"avx2"`` or ``"avx512"``: what the kernels use on this machine."""
    library, reason = load()
    return "" if reason else library.lpsgld_target().decode()


def refusal(op: str, x: Tensor, formats: Sequence[NumberFormat]) -> str | None:
    """Why ``op`` on ``x`` is left to the reference; ``None`` if it is not.

    Args:
        op: Name of the op, as in :func:`lightning_lpsgld.ops.dispatch.choose`.
        x: Tensor of the call (the codes, for ``"decode"``).
        formats: Formats of the call.
    """
    if x.device.type != "cpu":
        return f"the tensor is on {x.device.type}."
    if type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return "tensor subclasses and traced code take the reference."
    if op == "langevin_steps_" and x.dtype != torch.float32:
        return f"the fused step takes float32, got {x.dtype}."
    if op != "decode" and x.dtype not in _DTYPES:
        return f"the kernels take float32, bfloat16 and float16, got {x.dtype}."
    for fmt in formats:
        if fmt.family not in FAMILIES or (fmt.family == "scaled" and op != "langevin_steps_"):
            return f"no kernel has {'the scales of ' if fmt.blocks.shared else ''}{fmt} built in."
        if run_length(x.shape, fmt) < 0:
            return f"blocks of {fmt} are not runs of equal length in a tensor of shape {tuple(x.shape)}."
        if op == "decode" and not fmt.linear and fmt.bits > 16:
            return f"codes of {fmt} have more than 16 bits."
    return None


def _dense(x: Tensor, fmt: NumberFormat) -> tuple[Tensor, Shape]:
    """``x`` (a contiguous copy, if its memory has any other order than row-major or channels-last) and its shape."""
    layout = layout_of(x, fmt)
    if layout is None or x.is_neg():
        x, layout = x.resolve_neg().contiguous(), (0, 0)
    return x, Shape(x.numel(), run_length(x.shape, fmt), *layout)


def _quantize(
    x: Tensor, fmt: NumberFormat, mode: int, variance: float, key: DrawKey | None, saturate: bool = True
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    x, shape = _dense(x, fmt)
    out = torch.empty_like(x)
    load()[0].lpsgld_quantize(
        ctypes.byref(native_format(fmt, x.dtype, saturate)),
        ctypes.byref(shape),
        _DTYPES[x.dtype],
        pointer(x),
        pointer(out),
        mode,
        ctypes.c_double(variance),
        ctypes.byref(native_key(key)),
        torch.get_num_threads(),
    )
    return out


def quantize(x: Tensor, fmt: NumberFormat, rounding: Rounding, key: DrawKey | None) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize`; equal to the reference bit for bit."""
    return _quantize(x, fmt, MODES[rounding], 0.0, key)


def quantize_variance_corrected(mean: Tensor, variance: float | Tensor, fmt: NumberFormat, key: DrawKey) -> Tensor:
    """See :func:`lightning_lpsgld.ops.quantize_variance_corrected`; a variance per element takes the reference."""
    if isinstance(variance, Tensor) and variance.numel() != 1:
        return reference.quantize_variance_corrected(mean, variance, fmt, key)
    return _quantize(mean, fmt, MODES["vc"], float(variance), key)


def draw_beyond_range(mean: Tensor, variance: float, fmt: FloatingPoint, key: DrawKey) -> Tensor:
    """Q^vc of floating point that does not saturate: draws beyond the range stay (infinities too), for runs that carry.

    Args:
        mean: Means, float32.
        variance: v >= 0.
        fmt: Element format.
        key: Names the draws.
    """
    return _quantize(mean, fmt, MODES["vc"], variance, key, saturate=False)


def encode(x: Tensor, fmt: NumberFormat, rounding: Rounding, key: DrawKey | None) -> Encoded:
    """See :func:`lightning_lpsgld.ops.encode`; one pass from values to codes, equal to the reference bit for bit."""
    if x.numel() == 0:
        return reference.encode(x, fmt, rounding, key)
    x, shape = _dense(x, fmt)
    codes = torch.empty_like(x, dtype=fmt.code_dtype)
    exponents = None
    if fmt.blocks.shared:
        exponents = torch.empty(fmt.blocks.compact(x.shape), dtype=torch.int8)
    missing = load()[0].lpsgld_encode(
        ctypes.byref(native_format(fmt, x.dtype)),
        ctypes.byref(shape),
        _DTYPES[x.dtype],
        pointer(x),
        pointer(codes),
        codes.element_size(),
        None if exponents is None else pointer(exponents),
        MODES[rounding],
        ctypes.byref(native_key(key)),
        torch.get_num_threads(),
    )
    if missing and not _has_nan(fmt):
        lack = f"the codes of {fmt} have no NaN" if fmt.linear else f"{fmt} has no NaN"
        raise ValueError(f"encode: {lack}, but {missing} of {x.numel()} elements are NaN.")
    return Encoded(codes, exponents, fmt)


def _has_nan(fmt: NumberFormat) -> bool:
    kernel = fmt.kernel(torch.float32)
    return kernel is not None and kernel.has_nan


@lru_cache(maxsize=8)
def _value_table(fmt: NumberFormat) -> Tensor:
    """Value of every bit pattern of the code dtype, float32."""
    dtype = fmt.code_dtype
    patterns = torch.arange(2 ** torch.iinfo(dtype).bits).to(dtype)
    return reference.decode(Encoded(patterns, None, fmt), torch.float32)


def _decode(encoded: Encoded, out: Tensor, *, packed: bool = False) -> None:
    """Write the values of ``encoded`` into ``out``: float32, dense, memory order of the codes, which may be packed."""
    fmt, codes, exponents = encoded.format, encoded.codes, encoded.exponents
    table = None if fmt.linear else _value_table(fmt)
    exponents = None if exponents is None else exponents.contiguous()
    load()[0].lpsgld_decode(
        pointer(codes),
        -fmt.bits if packed else codes.element_size(),
        None if exponents is None else pointer(exponents),
        native_format(fmt, torch.float32).offset if table is None else 0,
        None if table is None else pointer(table),
        pointer(out),
        ctypes.c_int64(out.numel()),
        ctypes.c_int64(run_length(out.shape, fmt)),
        torch.get_num_threads(),
    )


def decode(encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """See :func:`lightning_lpsgld.ops.decode`; equal to the reference bit for bit."""
    codes = encoded.codes
    if codes.numel() == 0 or dtype == torch.float64 or encoded.format.element is not encoded.format:
        return reference.decode(encoded, dtype)
    if layout_of(codes, encoded.format) is None:
        codes = codes.contiguous()
    out = torch.empty_like(codes, dtype=torch.float32)
    _decode(Encoded(codes, encoded.exponents, encoded.format), out)
    return out.to(dtype)


def decode_packed(packed: Tensor, exponents: Tensor | None, fmt: NumberFormat, out: Tensor) -> bool:
    """Write the values of codes of fewer than 8 bits that lie side by side into ``out``, opened as they are decoded.

    Args:
        packed: uint8, codes in the memory order of ``out`` (:func:`.packing.pack`).
        exponents: Shared ones, compact.
        fmt: The grid.
        out: float32, dense.

    Returns:
        Whether that was done; not where the memory order or the format is none that the kernel knows.
    """
    if layout_of(out, fmt) is None or fmt.element is not fmt:
        return False
    _decode(Encoded(packed, exponents, fmt), out, packed=True)
    return True


def decode_into(encoded: Encoded, out: Tensor) -> Tensor:
    """Write the values of ``encoded`` into ``out``, without a temporary where ``out`` is float32 in the codes' layout.

    Args:
        encoded: What :func:`lightning_lpsgld.ops.encode` returned.
        out: Tensor of the shape of the codes; floating dtype, CPU. Overwritten.

    Returns:
        ``out``.

    Raises:
        ValueError: If the shapes differ.
    """
    codes = encoded.codes
    if out.shape != codes.shape:
        raise ValueError(f"decode_into: `out` must have the codes' shape {tuple(codes.shape)}, got {tuple(out.shape)}.")
    direct = (
        out.dtype == torch.float32 and out.stride() == codes.stride() and layout_of(codes, encoded.format) is not None
    )
    if codes.numel() and direct and refusal("decode", codes, (encoded.format,)) is None and not out.is_neg():
        with torch.no_grad():
            _decode(encoded, out)
        mark_written(out)
        return out
    with torch.no_grad():
        return out.copy_(decode(encoded, torch.float32))


def _native_step(spec: StepSpec) -> Step:
    weight, gradient = spec.weight_format, spec.gradient_format
    noise = 0.0 if spec.accumulation == "vc" else spec.noise_variance**0.5
    return Step(
        spec.noise_variance,
        spec.lr,
        spec.weight_decay,
        noise,
        MODES["float" if weight is None else spec.accumulation],
        gradient is not None,
        native_format(weight, torch.float32),
        native_format(gradient, torch.float32),
    )


def _fill(
    row: StepTensor, param: Tensor, layout: tuple[int, int], spec: StepSpec, key: DrawKey, index: int, role: Role
) -> None:
    row.numel, row.channels, row.pixels = param.numel(), *layout
    row.last = param.shape[-1] if param.ndim else 1
    row.weight_inner = run_length(param.shape, spec.weight_format)
    row.gradient_inner = run_length(param.shape, spec.gradient_format)
    row.weight_key = native_key(key, stream_id(role, index))
    row.gradient_key = native_key(key, stream_id(Role.GRADIENT, index))


def langevin_steps_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    accumulators: Sequence[Tensor] | None,
    spec: StepSpec,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
) -> Tensor:
    """One step of all tensors in one call; see :func:`lightning_lpsgld.samplers.updates.langevin_steps_`.

    Without gradients nothing is moved: the weights are rounded from the accumulators, by draws of their own.

    Everything before a rounding is float32, operation for operation as in the composed step (noise: float32 normals,
    a few units in the last place from the reference's). Tensors in row-major or channels-last order are updated where
    they lie; others through a copy.

    Returns:
        Saturated values per tensor, int64.
    """
    rows, memory = (StepTensor * len(params))(), Memory()
    role = Role.VIEW if grads is None else Role.WEIGHT
    for i, (row, param, key, index) in enumerate(zip(rows, params, keys, indices)):
        dense, layout = memory.order_of(param, spec.weight_format, spec.gradient_format)
        row.param = memory.address(param, dense)
        row.grad = memory.address(None if grads is None else grads[i], dense, written=False)
        row.accumulator = memory.address(None if accumulators is None else accumulators[i], dense)
        _fill(row, param, layout, spec, key, index, role)
    load()[0].lpsgld_step(ctypes.byref(_native_step(spec)), rows, len(params), torch.get_num_threads())
    memory.finish()
    return torch.tensor([row.saturated for row in rows], dtype=torch.int64)
