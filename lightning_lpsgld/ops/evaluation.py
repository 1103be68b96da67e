"""Cast, batch norm, ReLU, cast: what stands between two layers in evaluation, as one pass over memory.

:func:`composed` is the definition: the same operations one after the other. :func:`evaluate` makes one pass of them on
a CPU, with the same bits: roundings are to nearest, and torch's batch norm of float32 is one fused multiply-add with a
scale and a shift per channel, ``fma(x, s, fma(-mean, s, bias))`` with ``s = weight / sqrt(var + eps)``, where torch is
compiled for processors with that instruction. Where it is not, results before the last rounding differ by at most one
unit in the last place of the larger of product and sum, and a code only where a threshold lies between the two.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import cpu
from lightning_lpsgld.ops.cpu_layout import pointer
from lightning_lpsgld.ops.cpu_library import load
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.functional import encode, quantize

__all__ = ["Chain", "Norm", "composed", "evaluate", "refusal", "rounded"]


@dataclass(frozen=True)
class Norm:
    """A batch norm in evaluation; the fields of :func:`torch.nn.functional.batch_norm`, floats of shape ``(C,)``."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """The batch norm of ``x``, shape ``(N, C, ...)``."""
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, False, 0.0, self.eps)


@dataclass(frozen=True, eq=False)  # tensors have no equality that is one bool
class Chain:
    """Operations that have not been made yet.

    Attributes:
        raw: What they begin with, shape ``(N, C, ...)``, float32.
        first: Format that it is rounded to, to nearest; ``None``: not at all.
        norm: The batch norm after that, if any.
        relu: Whether a ReLU follows.
    """

    raw: Tensor
    first: NumberFormat | None = None
    norm: Norm | None = None
    relu: bool = False

    @property
    def bare(self) -> bool:
        """Whether there is no operation yet."""
        return self.first is None and self.norm is None and not self.relu

    def with_norm(self, norm: Norm) -> Chain | None:
        """This and a batch norm; ``None`` if that is no chain."""
        return None if self.norm is not None or self.relu else replace(self, norm=norm)

    def with_relu(self) -> Chain:
        """This and a ReLU."""
        return replace(self, relu=True)


def composed(chain: Chain, last: NumberFormat | None) -> Tensor | Encoded:
    """The definition of :func:`evaluate`: one operation after the other."""
    x = chain.raw if chain.first is None else quantize(chain.raw, chain.first, rounding="nearest")
    x = x if chain.norm is None else chain.norm(x)
    x = F.relu(x) if chain.relu else x
    return x if last is None else encode(x, last, rounding="nearest")


def evaluate(chain: Chain, last: NumberFormat | None) -> Tensor | Encoded:
    """Make the operations of a chain, and a last rounding to nearest.

    Args:
        chain: One that :func:`refusal` does not refuse.
        last: Format of the last rounding; ``None``: floats are returned.

    Returns:
        Codes of at most 8 bits, or floats, in the memory order of ``chain.raw``.

    Raises:
        ValueError: If ``last`` is given and there is a NaN.

    Example:
        >>> from lightning_lpsgld import BlockFloatingPoint
        >>> bfp8 = BlockFloatingPoint(8)
        >>> norm = Norm(torch.zeros(3), torch.ones(3), None, None, 1e-5)
        >>> chain = Chain(torch.randn(2, 3, 4, 4), bfp8, norm, relu=True)
        >>> torch.equal(evaluate(chain, bfp8).codes, composed(chain, bfp8).codes)
        True
    """
    found = _fused(chain, last, codes=True) if refusal(chain.raw, chain.first, last) is None else None
    return composed(chain, last) if found is None else found


def rounded(chain: Chain, last: NumberFormat) -> Tensor:
    """As :func:`evaluate`, with the values of the codes; a NaN stays one."""
    found = _fused(chain, last, codes=False) if refusal(chain.raw, chain.first, last) is None else None
    if isinstance(found, Tensor):
        return found
    values = composed(chain, None)
    assert isinstance(values, Tensor)
    return quantize(values, last, rounding="nearest")


@lru_cache(maxsize=64)
def _number_refusal(fmt: NumberFormat) -> str | None:
    kernel = fmt.kernel(torch.float32)
    if fmt.family not in ("fixed", "block") or kernel is None or not fmt.linear or fmt.bits > 8:
        return f"{fmt} has no codes of at most 8 bits in fixed or block floating point"
    return None


def _format_refusal(fmt: NumberFormat, shape: torch.Size) -> str | None:
    if fmt.blocks.shared and fmt.blocks.compact(shape) != shape[:1]:
        return f"blocks of {fmt} are not whole samples"
    return _number_refusal(fmt)


def refusal(x: Tensor, *formats: NumberFormat | None) -> str | None:
    """Why a chain that begins with ``x`` is not made in one pass; ``None`` if it is."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype != torch.float32 or x.requires_grad:
        return "one pass is made of plain float32 tensors on a CPU"
    if x.ndim < 2 or not x.numel() or x.is_neg() or _channels_last(x) is None:
        return "its memory is neither row-major nor channels-last"
    missing = cpu.unavailable() or _missing()
    if missing is not None:
        return missing
    return next((r for fmt in formats if fmt is not None and (r := _format_refusal(fmt, x.shape)) is not None), None)


class _Grid(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("present", "shared", "offset", "low", "high", "carry")),
        *((name, ctypes.c_float) for name in ("code_min", "code_max")),
    ]


class _Native(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "codes", "exponents", "scale", "shift")),
        *((name, ctypes.c_int64) for name in ("samples", "channels", "pixels")),
        *((name, ctypes.c_int32) for name in ("channels_last", "relu")),
        ("first", _Grid),
        ("last", _Grid),
    ]


@cache
def _missing() -> str | None:
    library = load()[0]
    size = getattr(library, "lpsgld_chain_size", lambda: 0)()
    return None if size == ctypes.sizeof(_Native) else "the library of kernels has none for this. Install again."


@lru_cache(maxsize=64)
def _grid(fmt: NumberFormat | None) -> _Grid:
    if fmt is None:
        return _Grid()
    kernel = fmt.kernel(torch.float32)
    assert kernel is not None
    fields = (kernel.offset, kernel.low, kernel.high, kernel.carries)
    return _Grid(1, fmt.blocks.shared, *fields, kernel.code_min, kernel.code_max)


def _channels_last(x: Tensor) -> bool | None:
    """Whether memory is channels-last; ``None`` if it is neither that nor row-major."""
    if x.is_contiguous():
        return False
    return True if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else None


def _scale_and_shift(norm: Norm) -> Tensor | None:
    """Two rows: scale and shift of each channel; ``None`` if the batch norm is not of finite float32 numbers."""
    parts = [None if p is None else p.detach() for p in (norm.mean, norm.var, norm.weight, norm.bias)]
    if any(p is not None and (p.dtype != torch.float32 or type(p) is not Tensor) for p in parts):
        return None
    dense = [None if p is None else p.contiguous() for p in parts]
    out = torch.empty(2, norm.mean.numel())
    pointers = [None if p is None else pointer(p) for p in dense]
    rows = [pointer(row) for row in out]
    wrong = load()[0].lpsgld_norm(*pointers, ctypes.c_double(norm.eps), *rows, ctypes.c_int64(out.shape[1]))
    return None if wrong else out


def _fused(chain: Chain, last: NumberFormat | None, *, codes: bool) -> Any:
    """The result in one pass, as codes or values; ``None`` where numbers are left to the definition."""
    x = chain.raw
    affine = None if chain.norm is None else _scale_and_shift(chain.norm)
    if chain.norm is not None and affine is None:
        return None
    out = torch.empty_like(x, dtype=torch.int8 if last is not None and codes else torch.float32)
    exponents = None
    if out.dtype == torch.int8 and last is not None and last.blocks.shared:
        exponents = torch.empty(x.shape[:1], dtype=torch.int8)
    native = _Native(
        x=x.data_ptr(), samples=x.shape[0], channels=x.shape[1], pixels=x.shape[2:].numel(),
        channels_last=bool(_channels_last(x)), relu=chain.relu, first=_grid(chain.first), last=_grid(last),
    )  # fmt: skip
    setattr(native, "codes" if out.dtype == torch.int8 else "values", out.data_ptr())
    if affine is not None:
        native.scale, native.shift = (row.data_ptr() for row in affine)
    if exponents is not None:
        native.exponents = exponents.data_ptr()
    if load()[0].lpsgld_chain(ctypes.byref(native), torch.get_num_threads()):
        return None
    return out if out.dtype == torch.float32 else Encoded(out, exponents, last)  # type: ignore[arg-type]
