"""The compiled epochs (``kernels.cpp``), loaded with ctypes; built with the package where a compiler is present."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lpsgld.environment import cpu_limit
from lightning_lpsgld.linear.state import LOSSES, LinearState

__all__ = ["draw_words", "inner", "instruction_set", "normal_product", "outer", "unavailable"]

_LEVELS = ("baseline", "avx2", "avx512-vnni")
_POINTERS = ("x", "y", "margin", "odds", "residual", "full", "offset", "drift", "shrink", "order")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("n", "d", "batch", "blocks", "first_step")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_double) for name in ("gap", "unit", "lr")),
        *((name, ctypes.c_int32) for name in ("loss", "draws", "threads", "level")),
    ]


@cache
def _library() -> tuple[Any, str | None]:
    _, reason = cpu_limit()
    if reason is not None:
        return None, reason
    spec = importlib.util.find_spec("lightning_lpsgld.linear._kernels")
    if spec is None or spec.origin is None:
        return None, "the package was installed without a C++ compiler."
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"its library does not load: {error}."
    library.lpsgld_linear_inner.restype = ctypes.c_int64
    library.lpsgld_linear_outer.restype = ctypes.c_double
    return library, None


def unavailable() -> str | None:
    """Reason why the compiled kernels cannot run here, or ``None`` if they can."""
    return _library()[1]


def _level() -> int:
    limit, found = cpu_limit()[0], int(_library()[0].lpsgld_linear_level())
    return found if limit is None else min(found, limit)


def instruction_set() -> str:
    """``"avx512-vnni"``, ``"avx2"`` or ``"baseline"``; ``LIGHTNING_LPSGLD_CPU`` limits it."""
    return _LEVELS[_level()]


def _problem(state: LinearState, threads: int, **arrays: NDArray[np.generic]) -> _Problem:
    n, d = state.x.shape
    fields = {name: getattr(state, name) for name in ("x", "y", "margin", "odds", "residual", "full", "offset")}
    pointers = {name: array.ctypes.data for name, array in {**fields, **arrays}.items()}
    for name, array in fields.items():
        assert array.flags.c_contiguous, name
    return _Problem(
        **pointers,
        n=n,
        d=d,
        gap=state.gap,
        unit=state.unit,
        loss=LOSSES[state.loss][0],
        threads=threads,
        level=_level(),
    )


def draw_words(count: int, *, step: int, stream: int, seed: int) -> NDArray[np.uint32]:
    """Words of Philox4x32-10 as an inner step draws them: word w of counter 16 g + l is at 64 g + 16 w + l.

    Args:
        count: A multiple of 64.
        step: Counter of mini-batches.
        stream: 0 for offsets.
        seed: Key.
    """
    if count % 64:
        raise ValueError(f"`count` must be a multiple of 64, got {count}.")
    out = np.empty(count, dtype=np.uint32)
    _library()[0].lpsgld_linear_words(
        ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(count), ctypes.c_uint32(step), ctypes.c_uint32(stream),
        ctypes.c_uint64(seed % 2**64), ctypes.c_int32(_level()),
    )  # fmt: skip
    return out


def normal_product(x: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """See :func:`.fallback.normal_product`; on the calling thread alone, rows a multiple of 64 wide."""
    out = np.empty(x.shape[1], dtype=np.float32)
    _library()[0].lpsgld_linear_normal(
        ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]),
        ctypes.c_void_p(v.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int32(_level()),
    )  # fmt: skip
    return out


def outer(state: LinearState, threads: int = 1, *, order: NDArray[np.int32] | None = None, batch: int = 256) -> None:
    """See :func:`.fallback.outer`; ``threads`` change the order of summation only."""
    if order is None:
        order = np.arange(-(-len(state.x) // batch), dtype=np.int32)
    problem = _problem(state, threads, order=order)
    problem.batch, problem.blocks = batch, len(order)
    state.loss_sum = float(_library()[0].lpsgld_linear_outer(ctypes.byref(problem), ctypes.c_int32(state.low)))


def inner(
    state: LinearState,
    *,
    order: NDArray[np.int32],
    batch: int,
    lr: float,
    drift: NDArray[np.float32],
    shrink: NDArray[np.float32],
    seed: int,
    first_step: int,
    draws: bool = True,
    threads: int = 1,
) -> int:
    """See :func:`.fallback.inner`; draws are Philox4x32-10 words. Equal for equal ``threads``."""
    problem = _problem(state, threads, drift=drift, shrink=shrink, order=order)
    problem.batch, problem.blocks, problem.first_step = batch, len(order), first_step
    problem.seed, problem.lr, problem.draws = seed % 2**64, lr, int(draws)
    return int(_library()[0].lpsgld_linear_inner(ctypes.byref(problem), ctypes.c_int32(state.low)))
