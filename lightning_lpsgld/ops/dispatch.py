"""Which backend runs an op, and why: queryable, logged once."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import self_check

__all__ = [
    "BACKENDS",
    "BackendName",
    "backend_report",
    "choose",
    "choose_motion",
    "choose_step",
    "choose_views",
    "unavailable",
]

log = logging.getLogger(__name__)

#: What may be asked for; ``"auto"`` takes the first of the device's list that accepts the call.
BackendName = Literal["auto", "reference", "cpu", "triton", "qtorch"]

#: Order in which ``"auto"`` asks on each device type; the reference runs everywhere.
_AUTO: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
#: All backends.
BACKENDS = ("reference", "cpu", "triton", "qtorch")
#: Backends whose kernels are compiled for the device at hand, and so compared with the reference at their first use.
_COMPARED = ("triton",)
#: Ops that a backend runs on microscaling formats by way of their elements (:class:`.scaled.Scaled`).
_SCALED: dict[str, tuple[str, ...]] = {
    "cpu": ("quantize", "quantize_variance_corrected", "encode", "decode"),
    "triton": ("quantize", "encode", "decode"),  # Q^vc would wait for the device, to learn which scales there are
}

#: Where answers of :func:`choose` are kept, by all that they depend on: to ask again costs the host more time there
#: than a kernel takes. (Elsewhere backends ask for more than shapes, and the answer is cheap.)
_KEPT_ON = ("cuda",)
_MOST_KEPT = 16384
_kept: dict[tuple[Any, ...], Any] = {}

#: Backends whose fused step also rounds weights from their sums, without moving them.
_VIEWS = ("cpu",)


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"lightning_lpsgld.ops.{name}")


@cache
def unavailable(name: str) -> str | None:
    """Reason why backend ``name`` cannot run in this process, or ``None`` if it can.

    Raises:
        ValueError: If no backend has that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"`backend` must be 'auto' or one of {BACKENDS}, got {name!r}.")
    if name == "reference":
        return None
    reason: str | None = _module(name).unavailable()
    return reason


@cache
def _say_once(message: str) -> None:
    log.info(message)


def backend_report() -> dict[str, str]:
    """What each backend can do here: its name mapped to ``"available"`` or the reason why not.

    Behind ``"available"`` stand the kernels that failed their check at first use, if any: the reference runs for them.

    Returns:
        Backend name to ``"available"`` or the reason.
    """
    report = {name: unavailable(name) or "available" for name in BACKENDS}
    for name in _COMPARED:
        report[name] = "; but ".join([report[name], *self_check.failures()])
    return report


def _refusal(name: str, op: str, x: Tensor, formats: Sequence[NumberFormat]) -> str | None:
    """Why backend ``name`` will not run ``op`` on ``x``; ``None`` if it will."""
    if name == "reference":
        return None
    missing = unavailable(name)
    if missing is not None:
        return missing
    if op in _SCALED.get(name, ()):
        formats = [fmt.element for fmt in formats]
    reason: str | None = _module(name).refusal(op, x, formats)
    return reason


def _distrust(name: str, op: str, x: Tensor, formats: Sequence[NumberFormat]) -> str | None:
    """Why the kernel of backend ``name`` is not to be used although it takes the call: it failed its check."""
    if name not in _COMPARED or not x.numel():
        return None
    fmt = formats[0]
    rows = _module(name).rows_of(x.shape, fmt.element)
    return self_check.op_trouble(_engine(name, formats), op, x, fmt, rows.shared, rows.length)


def _engine(name: str, formats: Sequence[NumberFormat]) -> Any:
    if name not in _SCALED or not any(fmt.element is not fmt for fmt in formats):
        return _module(name)
    return _module("scaled").Scaled(_module(name))


def choose(backend: str, op: str, x: Tensor, *formats: NumberFormat) -> Any:
    """Module that runs ``op`` on ``x``.

    Args:
        backend: ``"auto"`` takes the first of the device's list that accepts; any other name is binding.
        op: ``"quantize"``, ``"quantize_variance_corrected"``, ``"encode"``, ``"decode"`` or ``"langevin_steps_"``.
        x: A tensor of the call.
        formats: Formats of the call.

    Returns:
        A module, or :class:`.scaled.Scaled`, with a function of that name.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If the backend that was asked for cannot run this call; the message gives the reason.
    """
    if x.device.type not in _KEPT_ON:
        return _chosen(backend, op, x, formats)
    name = (backend, op, x.shape, x.dtype, x.device, formats)
    engine = _kept.get(name)
    if engine is None:
        engine = _chosen(backend, op, x, formats)
        put_off = x.is_cuda and torch.cuda.is_current_stream_capturing()  # checks, in a capture
        if len(_kept) < _MOST_KEPT and not put_off:
            _kept[name] = engine
    return engine


def _chosen(backend: str, op: str, x: Tensor, formats: tuple[NumberFormat, ...]) -> Any:
    """:func:`choose`, asked anew."""
    if backend != "auto":
        reason = _refusal(backend, op, x, formats) or _distrust(backend, op, x, formats)
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} cannot run {op} here: {reason} Use backend='auto' or 'reference'.")
        return _engine(backend, formats)
    for name in _AUTO.get(x.device.type, ("reference",)):
        reason = _refusal(name, op, x, formats) or _distrust(name, op, x, formats)
        if reason is None:
            return _engine(name, formats)
        _say_once(f"{op} on {x.device.type} does not use backend {name!r}: {reason}")
    return _module("reference")


def choose_step(
    backend: str, tensors: Sequence[Tensor], *formats: NumberFormat, distrust: Callable[[ModuleType], str | None]
) -> ModuleType | None:
    """Module with a fused ``langevin_steps_`` for all ``tensors``, or ``None``: then the composed ops run.

    ``distrust`` says of a module whose kernels are compiled for the device at hand why its step is not to be used.

    Raises:
        RuntimeError: As :func:`choose`; a backend without fused step (``"reference"``, ``"qtorch"``) gives ``None``.
    """
    if backend in ("reference", "qtorch") or torch.compiler.is_compiling():
        return None
    candidates = [backend] if backend != "auto" else _AUTO.get(tensors[0].device.type, ())
    for name in candidates:
        if name == "reference":
            return None
        reason = _step_refusal(name, tensors, formats)
        if reason is None and name in _COMPARED:
            reason = distrust(_module(name))
        if reason is None:
            return _module(name)
        if backend != "auto":
            raise RuntimeError(f"backend={backend!r} cannot run the fused step here: {reason} Use backend='auto'.")
        _say_once(f"The fused step on {tensors[0].device.type} does not use backend {name!r}: {reason}")
    return None


def _step_refusal(name: str, tensors: Sequence[Tensor], formats: tuple[NumberFormat, ...]) -> str | None:
    """Why a backend does not take the fused step of all these tensors; ``None`` if it does, which is kept."""
    key: Any = None
    if tensors[0].device.type in _KEPT_ON:
        key = (name, formats, *((x.shape, x.dtype, x.device, x.is_contiguous()) for x in tensors))
        if key in _kept:
            return None
    reasons = (_refusal(name, "langevin_steps_", tensor, formats) for tensor in tensors)
    reason = next((r for r in reasons if r is not None), None)
    if reason is None and key is not None and len(_kept) < _MOST_KEPT:
        _kept[key] = name
    return reason


def choose_motion(backend: str, tensors: Sequence[Tensor], formats: Sequence[NumberFormat]) -> ModuleType | None:
    """Module with the fused steps of :mod:`.cpu_motion` for all ``tensors``, or ``None``: then the composed ops run.

    Args:
        backend: As for :func:`choose`; one without such steps gives ``None``.
        tensors: Weights and what lies beside them.
        formats: All formats of the steps.
    """
    if backend not in ("auto", "cpu") or tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return None
    fused = _module("cpu_motion")
    reason: str | None = fused.refusal(tensors, formats)
    if reason is None:
        return fused
    _say_once(f"The fused step with a second tensor does not use backend 'cpu': {reason}")
    return None


def choose_views(backend: str, tensors: Sequence[Tensor], fmt: NumberFormat) -> ModuleType | None:
    """Module whose ``langevin_steps_`` rounds all ``tensors`` from their sums, or ``None``: then the composed ops run.

    Raises:
        RuntimeError: As :func:`choose_step`.
    """
    fused = choose_step(backend, tensors, fmt, distrust=lambda module: None)  # none of those has views
    return fused if any(fused is _module(name) for name in _VIEWS) else None
