"""Scores of predictions: of each sample and of the growing ensemble, and further ones of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_lpsgld.metrics import (
    AURC,
    Accuracy,
    AdaptiveCalibrationError,
    AleatoricVariance,
    BrierScore,
    CalibratedNLL,
    CalibrationError,
    CategoricalNLL,
    ClasswiseCalibrationError,
    CoverageAtRisk,
    EpistemicVariance,
    IntervalCoverage,
    IntervalWidth,
    MeanScore,
    MixtureCRPS,
    MixtureNLL,
    MixturePoints,
    MixtureRMSE,
    MixtureScore,
    QuantileCalibration,
)
from lightning_lpsgld.predictive.ensemble import PosteriorPredictive
from lightning_lpsgld.predictive.running import RunningPredictive
from lightning_lpsgld.predictive.tasks import Regression, Task

__all__ = ["Metrics", "Scorer", "default_metrics", "further_scores", "regression_metrics"]

#: Makes a fresh collection of metrics for that many classes.
Metrics = Callable[[int], MetricCollection]


def default_metrics(num_classes: int) -> MetricCollection:
    """Accuracy, NLL, Brier score, ECE with 15 bins and the published code's, on probabilities and targets.

    Args:
        num_classes: Number of classes.

    Returns:
        Metrics called ``accuracy``, ``nll``, ``brier``, ``ece`` and ``ece_paper``; all states are sums.
    """
    return MetricCollection(
        {
            "accuracy": Accuracy(),
            "nll": CategoricalNLL(),
            "brier": BrierScore(),
            "ece": CalibrationError(num_bins=15),
            "ece_paper": CalibrationError(variant="paper"),
        },
        compute_groups=False,
    )


def regression_metrics(num_outputs: int = 1) -> MetricCollection:
    """RMSE, NLL, CRPS, coverage of the central 50, 90 and 95 %, epistemic and aleatoric variance.

    Args:
        num_outputs: Not used; it stands where :func:`default_metrics` has the number of classes.

    Returns:
        Metrics called ``rmse``, ``nll``, ``crps``, ``coverage_50``, ``coverage_90``, ``coverage_95``, ``epistemic`` and
        ``aleatoric``; all states are sums.
    """
    coverages = {f"coverage_{level}": IntervalCoverage(level / 100) for level in (50, 90, 95)}
    return MetricCollection(
        {
            "rmse": MixtureRMSE(),
            "nll": MixtureNLL(),
            "crps": MixtureCRPS(),
            **coverages,
            "epistemic": EpistemicVariance(),
            "aleatoric": AleatoricVariance(),
        },
        compute_groups=False,
    )


class PointMean(MeanScore):
    """Mean of values that are known per point, over batches and ranks."""

    def update(self, terms: Tensor) -> None:
        """Add values, any shape."""
        self.add(terms)


def _add(metrics: MetricCollection, prediction: Any, targets: Tensor) -> None:
    """Give metrics what they take: probabilities, or of a mixture its facts, or else its mean."""
    if not isinstance(prediction, MixturePoints):
        metrics.update(prediction, targets)
        return
    for metric in metrics.values(copy_state=False):
        if isinstance(metric, (MixtureScore, QuantileCalibration)):
            metric.update(prediction)
        else:
            metric.update(prediction.center, targets)


class Scorer:
    """Metrics that are made when the first prediction is there, and passed over where there are no targets.

    Args:
        build: Makes metrics from the number of classes (1 for a regression); ``None``: nothing is scored.
    """

    def __init__(self, build: Metrics | None) -> None:
        self.build = build
        self.metrics: MetricCollection | None = None
        self._unusable: PointMean | None = None

    def update(self, prediction: Any, targets: Tensor | None, finite: Tensor | None = None) -> None:
        """Add points: probabilities of shape ``(n, classes)`` or mixtures, targets, and which of them are finite."""
        if self.build is None or targets is None:
            return
        sample = prediction.center if isinstance(prediction, MixturePoints) else prediction
        if self.metrics is None:
            self.metrics = self.build(1 if isinstance(prediction, MixturePoints) else prediction.shape[1])
        _add(self.metrics.to(sample.device), prediction, targets)
        if finite is not None:
            self._unusable = PointMean() if self._unusable is None else self._unusable
            self._unusable.to(sample.device).update((~finite).double())

    def update_all(self, running: RunningPredictive) -> None:
        """Add the ensemble's prediction of every point."""
        if self.build is not None:
            for prediction, targets in running.batches():
                self.update(prediction, targets)

    def finish(self) -> dict[str, float]:
        """Scores since the last call; with ``torch.distributed`` initialized, of all ranks together."""
        if self.metrics is None:
            return {}
        scores = {name: float(value) for name, value in self.metrics.compute().items()}
        self.metrics.reset()
        return scores

    def unusable(self) -> int:
        """Points since the last call whose prediction was not finite; of all ranks together, like :meth:`finish`."""
        if self._unusable is None or not self._unusable.update_called:
            return 0
        with self._unusable.sync_context():
            total = int(self._unusable.total)
        self._unusable.reset()
        return total


@torch.no_grad()
def further_scores(task: Task, running: RunningPredictive, num_bins: int = 15) -> dict[str, float]:
    """Scores that are made of a finished ensemble only, because they cost more than sums.

    Args:
        task: What is predicted.
        running: Its predictions, with targets.
        num_bins: Number of bins of the calibration errors.

    Returns:
        For classes ``ece_adaptive``, ``ece_classwise``, ``calibrated_nll``, ``aurc``, ``coverage_at_risk_5`` (share of
        points with an error rate of at most 5 %), ``disagreement`` and ``mutual_information``. For a regression
        ``width_50``, ``width_90``, ``width_95`` and ``quantile_error``. Empty without targets. With
        ``torch.distributed`` initialized, of all ranks together.
    """
    scorer = Scorer(_mixture_metrics if isinstance(task, Regression) else lambda n: _class_metrics(n, num_bins))
    scorer.update_all(running)
    scores = scorer.finish()
    if isinstance(running, PosteriorPredictive) and scores:
        for name in ("disagreement", "mutual_information"):
            mean, values = PointMean(), getattr(running, name)
            mean.to(values.device).update(values)
            scores[name] = float(mean.compute())
    return scores


def _mixture_metrics(num_outputs: int) -> MetricCollection:
    widths = {f"width_{level}": IntervalWidth(level / 100) for level in (50, 90, 95)}
    return MetricCollection({**widths, "quantile_error": QuantileCalibration()}, compute_groups=False)


def _class_metrics(num_classes: int, num_bins: int) -> MetricCollection:
    return MetricCollection(
        {
            "ece_adaptive": AdaptiveCalibrationError(num_bins),
            "ece_classwise": ClasswiseCalibrationError(num_classes, num_bins),
            "calibrated_nll": CalibratedNLL(),
            "aurc": AURC(),
            "coverage_at_risk_5": CoverageAtRisk(0.05),
        },
        compute_groups=False,
    )
