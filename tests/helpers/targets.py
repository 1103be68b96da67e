"""Published and exactly computed numbers that tests compare with, as data."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GAUSSIAN_TOY", "GAUSSIAN_TOY_BY_FRACTION", "TOY_GRADIENT_STD", "ToyRow", "ToyRowByFraction"]

#: Standard deviation of the gradient noise of the toy U(x) = x^2 / 2.
TOY_GRADIENT_STD = 0.1


class ToyRow(NamedTuple):
    """Stationary standard deviation and W2 distance to N(0, 1) at one step size; weights and gradients fixed8.3."""

    lr: float
    naive_std: float
    naive_w2: float
    vc_std: float
    vc_w2: float


class ToyRowByFraction(NamedTuple):
    """The same at lr = 1e-3 and range +-16 (W = F + 5), by fraction length."""

    fraction_length: int
    naive_std: float
    naive_w2: float
    vc_std: float
    vc_w2: float
    full_std: float


#: Four decimals of the exact law of the 256-state chain; the grid itself is at W2 = 0.0361 from N(0, 1).
GAUSSIAN_TOY = (
    ToyRow(0.1, 1.0330, 0.0484, 1.0263, 0.0443),
    ToyRow(0.03, 1.0293, 0.0461, 1.0077, 0.0368),
    ToyRow(0.01, 1.0658, 0.0745, 1.0025, 0.0361),
    ToyRow(0.005, 1.1241, 0.1287, 1.0013, 0.0361),
    ToyRow(0.002, 1.2846, 0.2864, 1.0005, 0.0361),
    ToyRow(0.001, 1.4967, 0.4976, 1.0003, 0.0361),
    ToyRow(0.0005, 1.7763, 0.7768, 1.0001, 0.0361),
    ToyRow(0.0002, 2.2334, 1.2336, 1.0001, 0.0361),
    ToyRow(0.0001, 2.6559, 1.6560, 1.0000, 0.0361),
)

GAUSSIAN_TOY_BY_FRACTION = (
    ToyRowByFraction(2, 2.1131, 1.1142, 1.0003, 0.0723, 1.0003),
    ToyRowByFraction(3, 1.4967, 0.4976, 1.0003, 0.0361, 1.0003),
    ToyRowByFraction(4, 1.1516, 0.1525, 1.0003, 0.0180, 1.0003),
    ToyRowByFraction(5, 1.0402, 0.0411, 1.0003, 0.0090, 1.0003),
)
