"""Calibration of every class's probability, not of the largest alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.metrics.base import Score, zeros
from lightning_lpsgld.metrics.functional import check_bins, check_predictions

__all__ = ["ClasswiseCalibrationError", "classwise_calibration_error"]


def classwise_sums(probabilities: Tensor, targets: Tensor, num_bins: int) -> Tensor:
    """Sum of (probability - membership) per class and bin, float64 of shape ``(classes, num_bins)``.

    Bins are those of :func:`~lightning_lpsgld.metrics.bin_sums`: (k-1)/M < p <= k/M, 0 in the first.
    """
    check_predictions(probabilities, targets)
    values, classes = probabilities.double(), probabilities.shape[1]
    hot = targets.double() if targets.ndim == 2 else torch.zeros_like(values).scatter_(1, targets.long()[:, None], 1.0)
    edges = torch.arange(1, num_bins + 1, dtype=torch.float64, device=values.device) / num_bins
    index = torch.bucketize(values, edges).clamp(max=num_bins - 1)
    index = index + num_bins * torch.arange(classes, device=values.device)
    sums = torch.zeros(classes * num_bins, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, index.flatten(), (values - hot).flatten()).view(classes, num_bins)


def classwise_calibration_error(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> Tensor:
    r"""Mean over classes of the calibration error of the class's probability (also "static" calibration error).

    .. math::
        \frac1C \sum_c \sum_k \frac{n_{ck}}{n} |\bar p_{ck} - \bar y_{ck}|

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Shape ``(n,)``, or ``(n, classes)`` if soft.
        num_bins: Number of equal bins.

    Returns:
        float64 scalar in [0, 1]; NaN for no predictions.

    Example:
        >>> import torch
        >>> classwise_calibration_error(torch.tensor([[0.0, 1.0], [0.25, 0.75]]), torch.tensor([1, 0]), num_bins=1)
        tensor(0.3750, dtype=torch.float64)

    Reference:
        Nixon et al., 2019, arXiv:1904.01685, equation 3; Kull et al., 2019, arXiv:1910.12656, equation 4.
    """
    sums = classwise_sums(probabilities, targets, check_bins(num_bins, "standard"))
    return sums.abs().sum(1).mean() / len(targets)


class ClasswiseCalibrationError(Score):
    """Mean calibration error of the classes' probabilities; see :func:`classwise_calibration_error`.

    Args:
        num_classes: Number of classes.
        num_bins: Number of equal bins.
        kwargs: Passed on to ``torchmetrics.Metric``.

    State: sum of gaps per class and bin, number of predictions. Added over ranks.

    Raises:
        ValueError: If a count is not a positive int.

    Example:
        >>> import torch
        >>> metric = ClasswiseCalibrationError(num_classes=2, num_bins=1)
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.25, 0.75]]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.3750, dtype=torch.float64)
    """

    sums: Tensor
    count: Tensor

    def __init__(self, num_classes: int, num_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_bins = check_bins(num_bins, "standard")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"`num_classes` must be an int >= 1, got {num_classes!r}.")
        self.add_state("sums", zeros(num_classes, num_bins), dist_reduce_fx="sum")
        self.add_state("count", zeros(), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of shape ``(n, classes)`` and targets of shape ``(n,)``, or ``(n, classes)`` if soft."""
        self.sums += classwise_sums(probabilities, targets, self.num_bins)
        self.count += len(targets)

    def compute(self) -> Tensor:
        """Calibration error in [0, 1], float64."""
        return self.sums.abs().sum(1).mean() / self.count
