"""What an epoch of a linear solver works on: arrays with fixed layout, shared by the compiled kernels and numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LOSSES", "LinearState", "empty_rows", "padded_width"]

#: Loss name -> (number in the kernels, largest second derivative).
LOSSES: dict[str, tuple[int, float]] = {"squared": (0, 1.0), "logistic": (1, 0.25)}


def padded_width(columns: int) -> int:
    """Columns rounded up to a multiple of 64, the strip of the kernels."""
    return -(-columns // 64) * 64


def empty_rows(n: int, width: int, dtype: type[np.generic]) -> NDArray[Any]:
    """Uninitialized rows, shape (n, width), each at the beginning of a cache line; ``width`` is a multiple of 64.

    No load of a vector then crosses a line. Pages are large where the system has such (numpy asks for them).
    """
    size = n * width * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, dtype=np.uint8)
    begin = -raw.ctypes.data % 64
    rows: NDArray[Any] = raw[begin : begin + size].view(dtype).reshape(n, width)
    return rows


@dataclass
class LinearState:
    """Data, centre and offset of one solve.

    Attributes:
        x: shape (n, d), d a multiple of 64; int8 codes (low precision) or float32; padding columns are zero.
        y: shape (n,), float32; -1 or 1 for the logistic loss.
        loss: Key of :data:`LOSSES`.
        penalty: shape (d,), float64; coefficient of half the squared coefficient.
        unit: Value of one data code; 1 for float32 data.
        margin: shape (n,), float64; inner products of the rows with the centre.
        odds: shape (n,) for the logistic loss, float32; exp(y margin), for the compiled kernels.
        residual: shape (n,), float64; derivatives of the loss that ``full`` holds.
        full: shape (d,), float64; sum of ``residual`` times rows.
        offset: shape (d,); int8 codes or float32.
        gap: Value of one offset code; 1 for float32.
        loss_sum: Sum of the losses at the centre.
    """

    x: NDArray[np.generic]
    y: NDArray[np.float32]
    loss: str
    penalty: NDArray[np.float64]
    unit: float = 1.0
    gap: float = 1.0
    loss_sum: float = 0.0
    margin: NDArray[np.float64] = field(init=False)
    odds: NDArray[np.float32] = field(init=False)
    residual: NDArray[np.float64] = field(init=False)
    full: NDArray[np.float64] = field(init=False)
    centre: NDArray[np.float64] = field(init=False)
    offset: NDArray[np.generic] = field(init=False)

    def __post_init__(self) -> None:
        n, d = self.x.shape
        self.margin, self.residual = np.zeros(n), np.zeros(n)
        self.odds = np.ones(n if self.loss == "logistic" else 1, dtype=np.float32)
        self.full, self.centre = np.zeros(d), np.zeros(d)
        self.offset = np.zeros(d, dtype=self.x.dtype)

    @property
    def low(self) -> bool:
        """Whether data and offsets have 8 bits."""
        return self.x.dtype == np.int8

    def gradient(self) -> NDArray[np.float64]:
        """Gradient of the objective at the centre, shape (d,)."""
        return self.full / len(self.x) + self.penalty * self.centre

    def objective(self) -> float:
        """Mean loss plus penalty at the centre, as of the last pass over all rows."""
        return float(self.loss_sum / len(self.x) + (self.penalty * self.centre**2).sum() / 2)
