"""The functions of :mod:`.functional` as ``torchmetrics.Metric``: sums of fixed size, added over batches and ranks.

Sums are float64. ``Metric`` keeps their dtype under ``.float()``, ``.half()`` and ``.to(dtype)``; only ``set_dtype``
would change it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lpsgld.metrics.functional import (
    BinVariant,
    ReliabilityBins,
    bin_sums,
    brier_terms,
    calibration_error_of_sums,
    check_bins,
    nll_terms,
    reliability_of_sums,
)

__all__ = ["BrierScore", "CalibrationError", "CategoricalNLL"]


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


class _MeanScore(Metric):
    """Mean of a score over predictions; a subclass gives the score of each."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", _zeros(), dist_reduce_fx="sum")
        self.add_state("count", _zeros(), dist_reduce_fx="sum")

    @abstractmethod
    def terms(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """Score of each prediction, shape ``(n,)``."""

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of shape ``(n, classes)`` and targets of shape ``(n,)``."""
        self.total += self.terms(probabilities, targets).sum()
        self.count += len(targets)

    def compute(self) -> Tensor:
        """Mean over all predictions, float64."""
        return self.total / self.count


class CategoricalNLL(_MeanScore):
    """Mean negative log likelihood from probabilities; see :func:`~lightning_lpsgld.metrics.categorical_nll`.

    State: sum of the terms and number of predictions, both added over ranks.

    Example:
        >>> import torch
        >>> metric = CategoricalNLL()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.4904, dtype=torch.float64)
    """

    def terms(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """Score of each prediction, shape ``(n,)``."""
        return nll_terms(probabilities, targets)


class BrierScore(_MeanScore):
    """Mean Brier score, summed over classes; see :func:`~lightning_lpsgld.metrics.brier_score`.

    State: sum of the terms and number of predictions, both added over ranks.

    Example:
        >>> import torch
        >>> metric = BrierScore()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.3125, dtype=torch.float64)
    """

    def terms(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """Score of each prediction, shape ``(n,)``."""
        return brier_terms(probabilities, targets)


class CalibrationError(Metric):
    """Expected calibration error and reliability diagram from sums per bin.

    torchmetrics keeps every confidence in a list and puts 1.0 into a bin of its own; here the state has the size of the
    bins, and bins are those of :func:`~lightning_lpsgld.metrics.bin_sums`.

    Args:
        num_bins: Number of equal bins; ignored by ``"paper"``.
        variant: ``"standard"``, or ``"paper"`` for the nine bins of the published tables.
        kwargs: Passed on to ``torchmetrics.Metric``.

    State: count, sum of confidences and number of correct predictions per bin; number of predictions. Added over ranks.

    Raises:
        ValueError: If ``variant`` is unknown or ``num_bins`` is not a positive int.

    Example:
        >>> import torch
        >>> metric = CalibrationError(num_bins=15)
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.25, 0.75]]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.3750, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, num_bins: int = 15, variant: BinVariant = "standard", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_bins, self.variant = num_bins, variant
        self.add_state("sums", _zeros(check_bins(num_bins, variant), 3), dist_reduce_fx="sum")
        self.add_state("count", _zeros(), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of shape ``(n, classes)`` and targets of shape ``(n,)``."""
        sums, count = bin_sums(probabilities, targets, self.num_bins, self.variant)
        self.sums += sums
        self.count += count

    def compute(self) -> Tensor:
        """Expected calibration error in [0, 1], float64."""
        return calibration_error_of_sums(self.sums, self.count)

    def reliability(self) -> ReliabilityBins:
        """Diagram data of what **this rank** has seen; inside ``Metric.sync_context()`` of all ranks.

        For ``"paper"`` the bin of confidence 0 is left out.
        """
        return reliability_of_sums(self.sums[1:] if self.variant == "paper" else self.sums)
