r"""Scores that depend on the order of confidences: equal-mass calibration error, risk against coverage.

Confidence is the largest probability. Predictions of equal confidence are not ordered: where an order matters, each
stands for the mean of those that it ties with, so results do not depend on the order of the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_lpsgld.metrics.base import Score
from lightning_lpsgld.metrics.functional import check_predictions, hits

__all__ = [
    "AURC",
    "AdaptiveCalibrationError",
    "CoverageAtRisk",
    "RankedScore",
    "adaptive_calibration_error",
    "area_under_risk_coverage",
    "coverage_at_risk",
    "risk_coverage",
]


def _confidences(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of each prediction and whether it is correct (of a soft target, how far), float64."""
    check_predictions(probabilities, targets)
    confidence, predicted = probabilities.max(1)
    return confidence.double(), hits(predicted, targets)


def _ranked(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Confidences in descending order, tie-averaged correctness, and the number of the last one of each tie."""
    order = confidence.argsort(descending=True, stable=True)
    confidence, correct = confidence[order], correct[order]
    _, group, sizes = torch.unique_consecutive(confidence, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=torch.float64, device=correct.device).index_add_(0, group, correct)
    return confidence, (sums / sizes)[group], sizes.cumsum(0) - 1


def _equal_mass_error(confidence: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    confidence, correct, _ = _ranked(confidence, correct)
    count, bins = len(confidence), min(num_bins, max(len(confidence), 1))
    which = torch.arange(count, device=confidence.device) * bins // max(count, 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    return gaps.index_add_(0, which, confidence - correct).abs().sum() / count


def adaptive_calibration_error(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> Tensor:
    r"""Expected calibration error over bins of equal mass: the sorted predictions in ``num_bins`` equal parts.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Shape ``(n,)``, or ``(n, classes)`` if soft.
        num_bins: Number of bins; with fewer predictions, one each. Sizes differ by at most one.

    Returns:
        float64 scalar in [0, 1]; NaN for no predictions.

    Example:
        >>> import torch
        >>> adaptive_calibration_error(torch.tensor([[0.0, 1.0], [0.25, 0.75]]), torch.tensor([1, 0]), num_bins=1)
        tensor(0.3750, dtype=torch.float64)

    Reference:
        Nixon et al., 2019, arXiv:1904.01685, section 3.2 (there per class).
    """
    return _equal_mass_error(*_confidences(probabilities, targets), num_bins)


def _risk_coverage(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, correct, ends = _ranked(confidence, correct)
    kept = torch.arange(1, len(correct) + 1, dtype=torch.float64, device=correct.device)
    return kept / len(correct), (1.0 - correct).cumsum(0) / kept, ends


def risk_coverage(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Error rate of the k most confident predictions, for k = 1 to n.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Shape ``(n,)``, or ``(n, classes)`` if soft.

    Returns:
        Coverages k/n and risks, float64, shape ``(n,)``.

    Example:
        >>> import torch
        >>> risk_coverage(torch.tensor([[0.25, 0.75], [0.0, 1.0]]), torch.tensor([0, 1]))
        (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([0.0000, 0.5000], dtype=torch.float64))
    """
    return _risk_coverage(*_confidences(probabilities, targets))[:2]


def area_under_risk_coverage(probabilities: Tensor, targets: Tensor) -> Tensor:
    r"""Mean over k of the error rate of the k most confident predictions (AURC); 0 is perfect.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Classes, int64, shape ``(n,)``.

    Returns:
        float64 scalar; NaN for no predictions.

    Example:
        >>> import torch
        >>> area_under_risk_coverage(torch.tensor([[0.25, 0.75], [0.0, 1.0]]), torch.tensor([0, 1]))
        tensor(0.2500, dtype=torch.float64)

    Reference:
        Geifman, Uziel & El-Yaniv, 2019, arXiv:1805.08206, equation 2.
    """
    return risk_coverage(probabilities, targets)[1].mean()


def _coverage_at_risk(confidence: Tensor, correct: Tensor, risk: float) -> Tensor:
    coverage, risks, ends = _risk_coverage(confidence, correct)
    allowed = coverage[ends][risks[ends] <= risk]
    if not len(coverage):
        return torch.tensor(torch.nan, dtype=torch.float64)
    return allowed.max() if len(allowed) else coverage.new_zeros(())


def coverage_at_risk(probabilities: Tensor, targets: Tensor, risk: float = 0.05) -> Tensor:
    """Largest share of predictions above a threshold of confidence whose error rate is at most ``risk``.

    A threshold keeps all predictions of equal confidence or none.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Classes, int64, shape ``(n,)``.
        risk: Share of errors that is allowed, in [0, 1].

    Returns:
        float64 scalar in [0, 1]; NaN for no predictions.

    Example:
        >>> import torch
        >>> coverage_at_risk(torch.tensor([[0.25, 0.75], [0.0, 1.0]]), torch.tensor([0, 1]), risk=0.1)
        tensor(0.5000, dtype=torch.float64)
    """
    return _coverage_at_risk(*_confidences(probabilities, targets), risk)


class RankedScore(Score):
    """A score of all confidences at once: they are kept (16 bytes a prediction), for their order is needed.

    State: confidences and correctness of all predictions, concatenated over ranks.
    """

    confidence: Any
    correct: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of shape ``(n, classes)`` and targets of shape ``(n,)``, or ``(n, classes)`` if soft."""
        confidence, correct = _confidences(probabilities, targets)
        self.confidence.append(confidence)
        self.correct.append(correct)

    def ranked_by(self) -> tuple[Tensor, Tensor]:
        """Confidence and correctness of everything seen."""
        empty = torch.zeros(0, dtype=torch.float64, device=self.device)
        return tuple(dim_zero_cat(part) if len(part) else empty for part in (self.confidence, self.correct))  # type: ignore[return-value]


class AdaptiveCalibrationError(RankedScore):
    """Expected calibration error over bins of equal mass; see :func:`adaptive_calibration_error`.

    Args:
        num_bins: Number of bins.
        kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ValueError: If there is no bin.

    Example:
        >>> import torch
        >>> metric = AdaptiveCalibrationError(num_bins=1)
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.25, 0.75]]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.3750, dtype=torch.float64)
    """

    def __init__(self, num_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 1:
            raise ValueError(f"`num_bins` must be an int >= 1, got {num_bins!r}.")
        self.num_bins = num_bins

    def compute(self) -> Tensor:
        """Calibration error in [0, 1], float64."""
        return _equal_mass_error(*self.ranked_by(), self.num_bins)


class AURC(RankedScore):
    """Area under the risk-coverage curve; see :func:`area_under_risk_coverage`.

    Example:
        >>> import torch
        >>> metric = AURC()
        >>> metric.update(torch.tensor([[0.25, 0.75], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Mean selective risk, float64."""
        return _risk_coverage(*self.ranked_by())[1].mean()


class CoverageAtRisk(RankedScore):
    """Largest share of predictions with at most this error rate; see :func:`coverage_at_risk`.

    Args:
        risk: Error rate that is allowed, in [0, 1].
        kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``risk`` is out of range.

    Example:
        >>> import torch
        >>> metric = CoverageAtRisk(risk=0.1)
        >>> metric.update(torch.tensor([[0.25, 0.75], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, risk: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(risk, (int, float)) or not 0.0 <= risk <= 1.0:
            raise ValueError(f"`risk` must lie in [0, 1], got {risk!r}.")
        self.risk = float(risk)

    def compute(self) -> Tensor:
        """Coverage in [0, 1], float64."""
        return _coverage_at_risk(*self.ranked_by(), self.risk)
