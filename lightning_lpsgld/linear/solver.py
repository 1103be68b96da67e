"""The outer loop: SVRG in float32, or HALP in 8 bits, on rows that are cached as the kernels want them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_lpsgld.linear import fallback, kernels
from lightning_lpsgld.linear.state import LOSSES, LinearState, empty_rows, padded_width

__all__ = ["SolveReport", "SolverName", "pack_rows", "solve", "step_size", "sweep_order"]

_SWEPT = 128  # rows of a block from which on the pass over all rows follows the blocks' order

#: Solvers of linear models: 8-bit HALP, and SVRG in float32.
SolverName = Literal["halp8", "svrg"]


@dataclass
class SolveReport:
    """What happened in a solve, one entry per epoch (the first before any step).

    Attributes:
        seconds: Wall time since the start of the solve, the packing of the data not included.
        objective: Mean loss plus penalty at the centre.
        gradient_norm: Euclidean norm of its gradient.
        saturated: Offsets that left their range, per epoch.
        bytes_read: Bytes of data that passed through the processor.
        converged: Whether the tolerance was met.
    """

    seconds: list[float] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    saturated: list[int] = field(default_factory=list)
    bytes_read: int = 0
    converged: bool = False


def pack_rows(
    x: NDArray[Any], *, low: bool, intercept: bool, rows: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """Scale every column to [-1, 1], pad, and reorder the rows; round to 8 bits where ``low``.

    Args:
        x: shape (n, features), any real dtype. Integers within ±127 are kept exactly.
        low: int8 codes k, each worth k/127 of the column's largest magnitude (rounding to nearest), instead of float32.
        intercept: Append a column of ones.
        rows: Order of the rows.

    Returns:
        The packed rows, shape (n, d), and the scale of each feature, shape (features,).
    """
    n, features = x.shape
    width = padded_width(features + intercept)
    packed = empty_rows(n, width, np.int8 if low else np.float32)
    packed[:, features:] = 0
    exact = np.issubdtype(x.dtype, np.integer) and n > 0 and max(abs(int(x.min())), abs(int(x.max()))) <= 127
    scale = np.full(features, 127.0) if exact else np.maximum(np.abs(x.min(0)), np.abs(x.max(0))).astype(np.float64)
    scale[scale == 0] = 1.0
    factor = ((127.0 if low else 1.0) / scale).astype(np.float32)
    chunk = max(1, 2**22 // max(features, 1))
    for begin in range(0, n, chunk):
        part = x[begin : begin + chunk] if rows is None else x[rows[begin : begin + chunk]]
        values = part.astype(np.float32, copy=False) * factor
        packed[begin : begin + chunk, :features] = np.rint(values) if low else values
    if intercept:
        packed[:, features] = 127 if low else 1
    return packed, scale


def _engine(compiled: bool | None) -> Any:
    """The module with the epochs: the compiled one where it can run, unless it is not wanted."""
    reason = kernels.unavailable()
    if compiled and reason is not None:
        raise RuntimeError(f"The compiled kernels cannot run: {reason} Use compiled=None for the numpy fallback.")
    return fallback if reason is not None or compiled is False else kernels


def step_size(
    x: NDArray[np.generic], *, unit: float, loss: str, batch: int, seed: int, compiled: bool | None = None
) -> float:
    """Half the inverse of a mini-batch's smoothness, estimated on up to 2048 rows by power iteration.

    The compiled product runs on one thread: the threads of a BLAS go on spinning for a while after a product, on the
    cores that the epochs are about to use. Rounded to 12 bits, so that it hardly depends on the order of summation.
    """
    draw, engine = np.random.default_rng(seed), _engine(compiled)
    rows = np.sort(draw.choice(len(x), min(len(x), 2048), replace=False))
    sample = x[rows].astype(np.float32) * np.float32(unit)
    v: NDArray[Any] = draw.standard_normal((int(x.shape[1]),), dtype=np.float32)
    top = 0.0
    for _ in range(20):
        length = max(float(np.linalg.norm(v)), 1e-30)
        v = engine.normal_product(sample, v / np.float32(length)) / np.float32(len(sample))
        top = float(np.linalg.norm(v))
    row = float((sample.astype(np.float64) ** 2).sum(1).mean())
    mantissa, exponent = math.frexp(0.5 / (LOSSES[loss][1] * (top + 2.0 * row / batch) + 1e-30))
    return math.ldexp(round(mantissa * 4096.0) / 4096.0, exponent)


def sweep_order(last: NDArray[np.int32] | None, coming: NDArray[np.int32]) -> NDArray[np.int32]:
    """Order in which a pass over all blocks finds most of them in the cache, between two orders of mini-batches.

    A sum over all rows may go through them in any order. It begins with what the mini-batches before it read last,
    going back, and ends with what those after it read first: each block is on the side on which it is nearer. Both
    orders of mini-batches stay as they were drawn.

    Args:
        last: shape (blocks,), order of the mini-batches before the pass; ``None`` if there were none.
        coming: shape (blocks,), order of those after it.
    """
    index = np.arange(len(coming), dtype=np.int32)
    until, since = np.empty_like(index), np.full_like(index, len(coming))
    until[coming] = index
    if last is not None:
        since[last] = index[::-1]
    near = since < until
    rest = index[~near]
    return np.concatenate([index[near][np.argsort(since[near])], rest[np.argsort(-until[rest])]])


def _box(state: LinearState, g: NDArray[np.float64], mu: float | None, previous: float | None, reach: float) -> float:
    """Half-width of the range of the offsets for the coming epoch."""
    if mu is not None:
        return float(np.linalg.norm(g)) / mu
    if previous is None:
        return float(np.abs(g).max()) * reach
    used = float(np.abs(state.offset.astype(np.int64)).max()) / 127.0
    return previous * (4.0 if used >= 1.0 else max(used, 1.0 / 64.0))


def solve(
    state: LinearState,
    *,
    batch: int,
    max_iter: int,
    tol: float,
    lr: float | None = None,
    mu: float | None = None,
    seed: int = 0,
    threads: int = 1,
    compiled: bool | None = None,
    draws: bool = True,
) -> SolveReport:
    """Run epochs of a full gradient and n/batch mini-batch steps until the gradient is small; ``state`` is changed.

    Args:
        state: Data, and the point to start from (zero when new).
        batch: Rows of a mini-batch.
        max_iter: Most epochs.
        tol: Stop once the gradient norm is at most ``tol`` times that at the start.
        lr: Step size; ``None``: :func:`step_size`.
        mu: Strong convexity for the box of the offsets, as in the paper; ``None``: the largest offset of the last epoch
            is the next box (four times as much if it was at the end of its range), which needs no constant and is
            tighter.
        seed: Of the order of mini-batches and of the draws.
        threads: Threads of the compiled kernels.
        compiled: Use the compiled kernels; ``None``: where there are any.
        draws: ``False`` rounds to nearest, only to time the draws.

    Returns:
        The report.

    Raises:
        RuntimeError: If ``compiled`` is True and there are no kernels.
    """
    engine, n = _engine(compiled), len(state.x)
    if lr is None:
        lr = step_size(state.x, unit=state.unit, loss=state.loss, batch=batch, seed=seed, compiled=compiled)
    draw, blocks, box, last = np.random.default_rng(seed), -(-n // batch), None, None
    report, start = SolveReport(), time.perf_counter()
    for epoch in range(max_iter + 1):
        order = draw.permutation(blocks).astype(np.int32)
        if batch < _SWEPT:
            engine.outer(state, threads)
        else:
            engine.outer(state, threads, order=sweep_order(last, order), batch=batch)
        state.centre += state.gap * state.offset.astype(np.float64)
        g = state.gradient()
        report.seconds.append(time.perf_counter() - start)
        report.objective.append(state.objective())
        report.gradient_norm.append(float(np.linalg.norm(g)))
        report.bytes_read += state.x.nbytes
        report.converged = report.gradient_norm[-1] <= tol * report.gradient_norm[0]
        if report.converged or epoch == max_iter or not np.isfinite(report.gradient_norm[-1]):
            break
        if state.low:
            box = _box(state, g, mu, box, min(blocks, 50) * lr)
            state.gap = box / 127.0
        a = lr * state.penalty
        drift = ((lr * state.full / n + a * state.centre) / state.gap).astype(np.float32)
        state.offset[:] = 0
        outside = engine.inner(
            state, order=order, batch=batch, lr=lr, drift=drift,
            shrink=(1.0 / (1.0 + a)).astype(np.float32), seed=seed, first_step=epoch * blocks, draws=draws,
            threads=threads,
        )  # fmt: skip
        last = order
        report.saturated.append(outside)
        report.bytes_read += state.x.nbytes
    return report
