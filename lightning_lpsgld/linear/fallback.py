"""The epochs of the linear solvers in numpy: the definition, and what runs where no compiled kernel is at hand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_lpsgld.linear.state import LinearState

__all__ = ["derivative", "inner", "normal_product", "outer"]

_CHUNK = 256


def derivative(loss: str, margin: NDArray[np.float64], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """Derivative of the loss with respect to the margin, shape of ``margin``."""
    if loss == "squared":
        return margin - y
    signed = y.astype(np.float64)
    return -signed / (1.0 + np.exp(np.clip(signed * margin, -700, 700)))


def _losses(loss: str, margin: NDArray[np.float64], y: NDArray[np.float32]) -> float:
    if loss == "squared":
        return float(((margin - y) ** 2).sum() / 2)
    return float(np.logaddexp(0.0, -y.astype(np.float64) * margin).sum())


def _stochastic(x: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float64]:
    lower: NDArray[np.float64] = np.floor(x)
    return lower + (draw.random(x.shape) < x - lower)


def normal_product(x: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """``x.T @ (x @ v)``, shape (d,), for contiguous rows x of shape (rows, d)."""
    product: NDArray[np.float32] = x.T @ (x @ v)
    return product


def outer(state: LinearState, threads: int = 1, *, order: NDArray[np.int32] | None = None, batch: int = 256) -> None:
    """Move the margins by the offset, bring loss and full gradient up to date; ``threads`` are numpy's business.

    In low precision what ``full`` still lacks of each derivative is rounded to 8 bits by the largest of 256 rows, and
    what was added is kept, so that the error shrinks with the changes themselves.

    Args:
        state: Changed in place.
        threads: Not used.
        order: In which the kernels visit blocks of ``batch`` rows; every sum is the same whichever it is, up to its
            rounding, and numpy goes from top to bottom.
        batch: Rows of a block.
    """
    z = state.offset.astype(np.float32)
    scale = state.unit * state.gap if state.low else 1.0
    state.loss_sum = 0.0
    for begin in range(0, len(state.x), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        x = state.x[rows].astype(np.float32)
        state.margin[rows] += scale * (x @ z).astype(np.float64)
        state.loss_sum += _losses(state.loss, state.margin[rows], state.y[rows])
        missing = derivative(state.loss, state.margin[rows], state.y[rows]) - state.residual[rows]
        if state.low and (largest := np.abs(missing).max()) > 0:
            missing = np.rint(missing * (127.0 / largest)) * (largest / 127.0)
        state.residual[rows] += missing
        state.full += state.unit * (missing @ x)


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
    r"""Mini-batch steps in ``order``; returns how many offsets left the range (0 for float32 ones).

    .. math:: z \leftarrow Q\left((z - \eta g / \delta - h) s\right)

    with h = ``drift`` the part of the step that is constant in an epoch and s = ``shrink`` the implicit L2 penalty.
    """
    draw, outside = np.random.default_rng((seed, first_step)), 0
    scale = state.unit * state.gap if state.low else 1.0
    z = state.offset.astype(np.float64)
    for block in order:
        rows = slice(int(block) * batch, (int(block) + 1) * batch)
        x = state.x[rows].astype(np.float32)
        margin, change = state.margin[rows], scale * (x @ z.astype(np.float32)).astype(np.float64)
        weights = derivative(state.loss, margin + change, state.y[rows]) - derivative(state.loss, margin, state.y[rows])
        if state.low and (largest := np.abs(weights).max()) > 0:
            units = weights * (127.0 / largest)
            weights = (_stochastic(units, draw) if draws else np.rint(units)) * (largest / 127.0)
        g = (lr * state.unit / state.gap / len(x)) * (weights.astype(np.float32) @ x).astype(np.float64)
        z = (z - g - drift) * shrink.astype(np.float64)
        if state.low:
            z = _stochastic(z, draw) if draws else np.rint(z)
            outside += int((np.abs(z) > 127).sum())
            z = np.clip(z, -127, 127)
    state.offset[:] = z
    return outside
