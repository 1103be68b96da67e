"""What all metrics here share: float64 sums that add over batches and ranks, and torchmetrics' plot.

Sums are float64. ``Metric`` keeps their dtype under ``.float()``, ``.half()`` and ``.to(dtype)``; only ``set_dtype``
would change it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanScore", "Score", "zeros"]


def zeros(*shape: int) -> Tensor:
    """float64 zeros, the start of every sum."""
    return torch.zeros(shape, dtype=torch.float64)


class Score(Metric):
    """A metric without gradient whose update does not need the state; smaller is better unless it says otherwise."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several, as every metric of torchmetrics does; needs matplotlib.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of such; ``None``: computed now.
            ax: Axes to draw into; a new figure by default.

        Returns:
            Figure and axes.
        """
        return self._plot(val, ax)


class MeanScore(Score):
    """Mean of a score over predictions; :meth:`add` takes the score of each.

    State: sum of the terms and their number, both added over ranks.

    Args:
        kwargs: Passed on to ``torchmetrics.Metric``.
    """

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", zeros(), dist_reduce_fx="sum")
        self.add_state("count", zeros(), dist_reduce_fx="sum")

    def add(self, terms: Tensor) -> None:
        """Add scores of single predictions, any shape."""
        self.total += terms.sum(dtype=torch.float64)
        self.count += terms.numel()

    def compute(self) -> Tensor:
        """Mean over all predictions, float64; NaN for none."""
        return self.total / self.count
