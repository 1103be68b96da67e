"""The functions of :mod:`.functional` as ``torchmetrics.Metric``: sums of fixed size, added over batches and ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lpsgld.metrics.base import MeanScore, Score, zeros
from lightning_lpsgld.metrics.functional import (
    BinVariant,
    ReliabilityBins,
    accuracy_terms,
    bin_sums,
    brier_terms,
    calibration_error_of_sums,
    check_bins,
    nll_terms,
    reliability_of_sums,
)

__all__ = ["Accuracy", "BrierScore", "CalibrationError", "CategoricalNLL"]


class Accuracy(MeanScore):
    """Share of predictions whose most probable class is the target (of a soft target, its largest class).

    State: number of hits and number of predictions, both added over ranks.

    Example:
        >>> import torch
        >>> metric = Accuracy()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of shape ``(n, classes)`` and targets of shape ``(n,)``, or ``(n, classes)`` if soft."""
        self.add(accuracy_terms(probabilities, targets))


class CategoricalNLL(MeanScore):
    """Mean negative log likelihood from probabilities; see :func:`~lightning_lpsgld.metrics.categorical_nll`.

    State: sum of the terms and number of predictions, both added over ranks.

    Example:
        >>> import torch
        >>> metric = CategoricalNLL()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.4904, dtype=torch.float64)
    """

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of shape ``(n, classes)`` and targets of shape ``(n,)``, or ``(n, classes)`` if soft."""
        self.add(nll_terms(probabilities, targets))


class BrierScore(MeanScore):
    """Mean Brier score, summed over classes; see :func:`~lightning_lpsgld.metrics.brier_score`.

    State: sum of the terms and number of predictions, both added over ranks.

    Example:
        >>> import torch
        >>> metric = BrierScore()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.3125, dtype=torch.float64)
    """

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of shape ``(n, classes)`` and targets of shape ``(n,)``, or ``(n, classes)`` if soft."""
        self.add(brier_terms(probabilities, targets))


class CalibrationError(Score):
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

    sums: Tensor
    count: Tensor

    def __init__(self, num_bins: int = 15, variant: BinVariant = "standard", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_bins, self.variant = num_bins, variant
        self.add_state("sums", zeros(check_bins(num_bins, variant), 3), dist_reduce_fx="sum")
        self.add_state("count", zeros(), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of shape ``(n, classes)`` and targets of shape ``(n,)``, or ``(n, classes)`` if soft."""
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
