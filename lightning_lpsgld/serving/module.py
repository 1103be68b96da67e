"""The posterior predictive as a LightningModule: ``trainer.test`` scores it, ``trainer.predict`` returns it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.metrics import CalibrationError, brier_score, categorical_nll
from lightning_lpsgld.predictive import ClassPrediction, PosteriorEnsemble, Prediction, RegressionPrediction
from lightning_lpsgld.predictive.batches import DataError, default_targets, required_targets
from lightning_lpsgld.predictive.tasks import IGNORED, check_labels, class_indices, same_points

__all__ = ["PosteriorModule"]


class PosteriorModule(pl.LightningModule):
    """A :class:`.PosteriorEnsemble` that a Trainer runs: ``trainer.test``, ``trainer.predict``.

    ``predict_step`` returns predictions. ``test_step`` and ``validation_step`` log ``ensemble/accuracy``, ``/nll``,
    ``/brier``, ``/ece`` (or ``/rmse``, ``/nll`` of a normal) over the epoch, and ``/coverage`` and ``/set_size`` (or
    ``/width``) when the ensemble is calibrated. There is nothing to fit.

    Args:
        ensemble: The ensemble.
        targets: ``targets(batch)`` gives the targets; by default the second element, or a mapping's usual key.

    Example:
        >>> import torch
        >>> from lightning_lpsgld.bank import SampleBank
        >>> net, bank = torch.nn.Linear(2, 3), SampleBank()
        >>> _ = bank.add(net, step=1)
        >>> module = PosteriorModule(PosteriorEnsemble(net, bank))
        >>> module.predict_step(torch.ones(4, 2), 0).mean.shape
        torch.Size([4, 3])
    """

    def __init__(
        self, ensemble: PosteriorEnsemble, *, targets: Callable[[Any], Tensor | None] = default_targets
    ) -> None:
        super().__init__()
        self.ensemble, self.targets = ensemble, targets
        #: One per dataloader and score; computed over all ranks when an epoch ends.
        self._meters: dict[tuple[int, str], Metric] = {}

    @classmethod
    def from_bank(cls, module: nn.Module, path: str | os.PathLike[str] | SampleBank, **options: Any) -> PosteriorModule:
        """Around :meth:`.PosteriorEnsemble.from_bank`, with its arguments."""
        return cls(PosteriorEnsemble.from_bank(module, path, **options))

    def forward(self, batch: Any) -> Prediction:
        """Prediction for a batch."""
        prediction: Prediction = self.ensemble(batch)
        return prediction

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """Prediction for a batch."""
        return self(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch."""
        self._score(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch."""
        self._score(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores()

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores()

    def _log_scores(self) -> None:
        several = len({loader for loader, _ in self._meters}) > 1
        for (loader, name), meter in self._meters.items():
            suffix = f"/dataloader_idx_{loader}" if several else ""
            # all ranks have the same value; `sync_dist` only keeps Lightning from warning that they might not
            self.log(
                f"ensemble/{name}{suffix}", meter.compute(), sync_dist=True, batch_size=1, add_dataloader_idx=False
            )
        self._meters = {}

    def _score(self, batch: Any, loader: int) -> None:
        truth = required_targets(batch, self.targets, "PosteriorModule", "test")
        prediction = self(batch)
        truth = truth.to(prediction.mean.device)
        if isinstance(prediction, ClassPrediction):
            self._score_classes(prediction, truth, loader)
            return
        if not same_points(prediction.mean, truth):
            raise DataError(
                f"PosteriorModule: targets must have the shape of the means, got {tuple(truth.shape)} and "
                f"{tuple(prediction.mean.shape)}."
            )
        self._score_values(prediction, truth.reshape(prediction.mean.shape), loader)

    def _update(self, loader: int, name: str, build: Callable[[], Metric], *values: Tensor) -> None:
        if (loader, name) not in self._meters:
            self._meters[loader, name] = build().to(self.device)
        self._meters[loader, name].update(*values)

    def _update_means(self, loader: int, terms: dict[str, Tensor]) -> None:
        for name, values in terms.items():
            self._update(loader, name, MeanMetric, values.float())

    def _score_classes(self, prediction: ClassPrediction, truth: Tensor, loader: int) -> None:
        p = prediction.mean
        if p.shape == truth.shape:  # one label a column
            self._update_means(loader, {"accuracy": (p > 0.5) == (truth > 0.5), "nll": _binary_nll(p, truth)})
            return
        flat, labels, keep = self._points(p, truth)
        if not len(labels):
            return
        terms = {
            "accuracy": flat.argmax(1) == labels,
            "nll": categorical_nll(flat, labels).expand(len(labels)),
            "brier": brier_score(flat, labels).expand(len(labels)),
        }
        if prediction.sets is not None:
            sets = prediction.sets[keep]
            terms["coverage"] = sets.gather(1, labels.long()[:, None])
            terms["set_size"] = sets.sum(1)
        self._update_means(loader, terms)
        self._update(loader, "ece", CalibrationError, flat, labels)

    def _points(self, p: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities ``(points, classes)`` and labels of the points that count, and which of all these are."""
        flat, labels = p.movedim(1, -1).reshape(-1, p.shape[1]), class_indices(truth, self.ensemble.task).reshape(-1)
        if len(flat) != len(labels):
            raise DataError(
                f"PosteriorModule: probabilities {tuple(p.shape)} take one class a point, got targets "
                f"{tuple(truth.shape)}."
            )
        ignored = getattr(self.ensemble.task, "ignore_index", None)
        keep = labels != (IGNORED if ignored is None else ignored)
        flat, labels = flat[keep], labels[keep]
        check_labels(labels, p.shape[1])
        return flat, labels, keep

    def _score_values(self, prediction: Any, truth: Tensor, loader: int) -> None:
        assert isinstance(prediction, RegressionPrediction)
        squared, variance = (truth - prediction.mean).square(), prediction.variance
        terms = {"nll": 0.5 * (squared / variance + (2 * torch.pi * variance).log())}
        if prediction.lower is not None and prediction.upper is not None:
            terms["coverage"] = (prediction.lower <= truth) & (truth <= prediction.upper)
            terms["width"] = prediction.upper - prediction.lower
        self._update_means(loader, terms)
        self._update(loader, "rmse", _RootMean, squared.float())


class _RootMean(MeanMetric):
    """Square root of a mean."""

    def compute(self) -> Tensor:
        return super().compute().sqrt()


def _binary_nll(p: Tensor, truth: Tensor) -> Tensor:
    return -torch.where(truth > 0.5, p, 1 - p).double().clamp(min=2.0**-126).log()
