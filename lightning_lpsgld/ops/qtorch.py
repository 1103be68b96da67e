"""The ``quantize`` contract on QPyTorch's own C++/CUDA ops.

QPyTorch takes float32 only and draws from its own generators: its results are neither seeded by a key nor resumable.
``qtorch.quant`` compiles C++ when it is first imported, so it is imported here only when this backend is asked for.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat, to_qtorch
from lightning_lpsgld.random import DrawKey

__all__ = ["quantize", "refusal", "unavailable"]


def unavailable() -> str | None:
    """Reason why QPyTorch cannot be used, or ``None``."""
    if importlib.util.find_spec("qtorch") is None:
        return "qtorch is not installed (pip install qtorch)."
    return None


def refusal(op: str, x: Tensor, formats: Sequence[NumberFormat]) -> str | None:
    """Reason why this backend does not take the call, or ``None``."""
    if op != "quantize":
        return f"QPyTorch has no {op}."
    if x.dtype != torch.float32:
        return f"QPyTorch takes float32 only, got {x.dtype}."
    try:
        for fmt in formats:
            to_qtorch(fmt)
            if fmt.family not in _FAMILIES:
                return f"QPyTorch has no op for {fmt}."
    except ValueError as error:
        return str(error)
    return None


@cache
def _quant() -> Any:
    """Import (and the first time compile) ``qtorch.quant``.

    Raises:
        RuntimeError: If it does not build; a compiler and ``ninja`` on PATH are needed.
    """
    warnings.warn(
        "backend='qtorch' draws from QPyTorch's own generators: results are neither seeded nor resumable, and DDP "
        "replicas will differ.",
        stacklevel=3,
    )
    try:
        import qtorch.quant as quant
    except Exception as error:
        raise RuntimeError(f"qtorch.quant did not build; it needs a C++ compiler and ninja on PATH. {error}") from error
    return quant


def _fixed(quant: Any, number: Any, x: Tensor, rounding: str) -> Any:
    options = {"wl": number.wl, "fl": number.fl, "clamp": True, "symmetric": number.symmetric}
    return quant.fixed_point_quantize(x, **options, rounding=rounding)


def _block(quant: Any, number: Any, x: Tensor, rounding: str) -> Any:
    return quant.block_quantize(x, wl=number.wl, dim=number.dim, rounding=rounding)


def _float(quant: Any, number: Any, x: Tensor, rounding: str) -> Any:
    return quant.float_quantize(x, exp=number.exp, man=number.man, rounding=rounding)


#: What this backend can: families of formats (:class:`.KernelIdentity`).
_FAMILIES: dict[str | None, Any] = {"fixed": _fixed, "block": _block, "float": _float}


def quantize(x: Tensor, fmt: NumberFormat, rounding: Literal["nearest", "stochastic"], key: DrawKey | None) -> Tensor:
    """QPyTorch's op with the meaning of ``fmt``; ``key`` is not used (see the module's docstring)."""
    return torch.as_tensor(_FAMILIES[fmt.family](_quant(), to_qtorch(fmt), x.contiguous(), rounding))
