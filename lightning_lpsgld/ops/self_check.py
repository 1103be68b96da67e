"""At its first use on a device a kernel is compared with the reference; what fails is not used again.

One small known case for each op, kind of format, dtype and place of the shared exponent, once a process and device. It
has the call's own format and row length, so that what is compiled for it is what the call needs anyway; after that it
takes milliseconds. A kernel that gives other results, or does not compile, is named in one warning, and the reference
takes over for what that kernel would have done; every other kernel stays in use.

``LIGHTNING_LPSGLD_SELF_CHECK``: ``off`` trusts every kernel; ``fail`` treats every kernel as one that failed,
``fail-OP`` those of one op (a comma-separated list, of ``quantize``, ``quantize_variance_corrected``, ``encode``,
``decode``, ``langevin_steps_``): so every fallback can be forced on any machine. It is read at each first use.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import reference
from lightning_lpsgld.random import DrawKey, normals

__all__ = ["OPS", "VARIABLE", "differing", "failures", "first_use", "known_values", "op_trouble"]

#: Environment variable that says which kernels to trust; see above.
VARIABLE = "LIGHTNING_LPSGLD_SELF_CHECK"
#: Ops that are checked.
OPS = ("quantize", "quantize_variance_corrected", "encode", "decode", "langevin_steps_")

#: Q^vc and steps decide on float32 thresholds where the reference has float64: a draw may fall between the two.
_TOLERATED_SHARE = 0.01
_KEY = DrawKey(seed=2**63 + 977, step=2**31 + 1, stream=3)
#: Standard deviations of Q^vc in the case: in gaps of the largest value, below and above the Gaussian regime.
_VARIANCES = (1e-6, 1e-2)

_lock = threading.RLock()
_results: dict[tuple[Any, ...], str | None] = {}


def failures() -> list[str]:
    """What has failed in this process, each with its details."""
    return [reason for reason in _results.values() if reason is not None]


def first_use(name: tuple[Any, ...], op: str, what: str, device: torch.device, check: Callable[[], str]) -> str | None:
    """Result of the check called ``name``, which is made if it has not been.

    Args:
        name: What the result is kept under.
        op: Which of :data:`OPS`.
        what: The kernel, in words, for the warning.
        device: Where it runs.
        check: Returns what is wrong, ``""`` if nothing is; an exception counts as wrong.

    Returns:
        ``None`` if the kernel can be used, else why not.

    Raises:
        ValueError: If the environment variable holds something else.
    """
    if name in _results:
        return _results[name]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # nothing can be compared here, and the next use outside of a capture is the first
    with _lock:
        if name not in _results:
            _results[name] = _made(op, what, device, check)
        return _results[name]


def _made(op: str, what: str, device: torch.device, check: Callable[[], str]) -> str | None:
    wish = _wish(op)
    if wish == "off":
        return None
    if wish == "fail":
        problem = f"it was made to fail by {VARIABLE}"
    else:
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                problem = check()
        except Exception as error:  # whatever a compiler or a driver may raise
            problem = f"{type(error).__name__}: {str(error).strip()[:600]}"
    if not problem:
        return None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    reason = f"the kernel of {what} failed its check against the reference on {where} ({problem})."
    warnings.warn(
        f"lightning_lpsgld: {reason} The reference ops take over for it: results are right, and slower. Please report "
        f"this with the versions of torch ({torch.__version__}) and Triton.",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason


def _wish(op: str) -> str:
    """``"on"``, ``"off"`` or ``"fail"``."""
    words = [word.strip() for word in os.environ.get(VARIABLE, "on").split(",") if word.strip()] or ["on"]
    allowed = {"on", "off", "fail", *(f"fail-{name}" for name in OPS)}
    unknown = [word for word in words if word not in allowed]
    if unknown:
        raise ValueError(
            f"{VARIABLE} must be on, off, fail, or a list of fail-OP with OP in {OPS}, got {unknown[0]!r}."
        )
    if "fail" in words or f"fail-{op}" in words:
        return "fail"
    return "off" if "off" in words else "on"


def known_values(shape: Sequence[int], stream: int, dtype: torch.dtype) -> Tensor:
    """Values below 2 over a few binades, on the CPU; zeros and tops of blocks among them. No generator moves."""
    x = normals(tuple(shape), DrawKey(seed=4, stream=stream))
    spread = normals(tuple(shape), DrawKey(seed=5, stream=stream))
    flat = (x * torch.exp(spread)).flatten().clamp_(-1.9, 1.9)
    flat[::7] = 0.0
    flat[1::29] = 127.75 / 64
    return flat.reshape(tuple(shape)).to(dtype)


def differing(ours: Tensor, theirs: Tensor, *, exact: bool, what: str) -> str:
    """How two tensors differ, in words; ``""`` if they do not, or not more than declared."""
    ours = ours.cpu()
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{what}: {tuple(ours.shape)} {ours.dtype} instead of {tuple(theirs.shape)} {theirs.dtype}"
    wrong = (ours != theirs) & ~((ours != ours) & (theirs != theirs))
    count = int(wrong.sum())
    if count <= (0 if exact else max(1, int(_TOLERATED_SHARE * ours.numel()))):
        return ""
    first = int(wrong.flatten().nonzero()[0])
    pair = f"{ours.flatten()[first].item()!r} instead of {theirs.flatten()[first].item()!r}"
    return f"{what}: {count} of {ours.numel()} elements differ, the first is {pair}"


def op_trouble(engine: Any, op: str, x: Tensor, fmt: NumberFormat, shared: int, length: int) -> str | None:
    """Why ``engine``'s ``op`` cannot be used for tensors like ``x`` in ``fmt``; ``None`` if it can.

    Args:
        engine: Module or object that has the op.
        op: ``"quantize"``, ``"quantize_variance_corrected"``, ``"encode"`` or ``"decode"``.
        x: A tensor of the call: its device, dtype and shape count.
        fmt: Format of the call.
        shared: Where the backend's kernel takes exponents from.
        length: Elements of a block as the backend sees it.
    """
    kind = type(fmt).__name__
    name = (op, kind, getattr(fmt, "top", ""), x.dtype, shared, x.device)
    if name in _results:
        return _results[name]
    dtype = torch.float32 if op == "decode" else x.dtype
    shape, known = fmt.small_case(length)
    values = known_values(shape, 1, dtype)
    check = {
        "quantize": _check_quantize, "encode": _check_encode, "decode": _check_decode,
        "quantize_variance_corrected": _check_corrected,
    }[op]  # fmt: skip
    what = f"{op}, {fmt}, {str(x.dtype)[6:]}, shape {tuple(values.shape)}"
    return first_use(name, op, what, x.device, lambda: check(engine, values, x.device, known))


def _check_quantize(engine: Any, x: Tensor, device: torch.device, fmt: NumberFormat) -> str:
    there = x.to(device)
    for rounding in ("stochastic", "nearest"):
        theirs = reference.quantize(x, fmt, rounding, _KEY)  # type: ignore[arg-type]
        problem = differing(engine.quantize(there, fmt, rounding, _KEY), theirs, exact=True, what=rounding)
        if problem:
            return problem
    return ""


def _check_corrected(engine: Any, x: Tensor, device: torch.device, fmt: NumberFormat) -> str:
    there = x.to(device)
    for variance in _VARIANCES:
        theirs = reference.quantize_variance_corrected(x, variance, fmt, _KEY)
        ours = engine.quantize_variance_corrected(there, variance, fmt, _KEY)
        problem = differing(ours, theirs, exact=False, what=f"variance {variance:g}")
        if problem:
            return problem
    return ""


def _check_encode(engine: Any, x: Tensor, device: torch.device, fmt: NumberFormat) -> str:
    theirs = reference.encode(x, fmt, "stochastic", _KEY)
    ours = engine.encode(x.to(device), fmt, "stochastic", _KEY)
    problem = differing(ours.codes, theirs.codes, exact=True, what="codes")
    if problem or theirs.exponents is None:
        return problem
    return differing(ours.exponents, theirs.exponents, exact=True, what="exponents")


def _check_decode(engine: Any, x: Tensor, device: torch.device, fmt: NumberFormat) -> str:
    encoded = reference.encode(x, fmt, "nearest", None)
    theirs = reference.decode(encoded, torch.float32)
    return differing(engine.decode(encoded.to(device), torch.float32), theirs, exact=True, what="values")
