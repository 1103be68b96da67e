"""Scores of the ensemble, logged during validation and test."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import MetricCollection

from lightning_lpsgld.bank import BankError, SampleBank, SampleInfo
from lightning_lpsgld.callbacks.collector import SampleCollector
from lightning_lpsgld.callbacks.passes import (
    EvaluationBatches,
    LogitsRule,
    TrainingBatches,
    logits_of,
    stage_loaders,
    targets_of,
    untouched_random_state,
)
from lightning_lpsgld.callbacks.ranks import RanksDisagreeError, opened_alike
from lightning_lpsgld.metrics import CalibrationError, ReliabilityBins
from lightning_lpsgld.predictive import (
    EnsembleResult,
    PosteriorPredictive,
    SampleResult,
    bayesian_model_average,
    default_metrics,
    probabilities_of,
)

__all__ = ["EnsembleEvaluation"]

#: Key -> value of one dataloader.
Scores = dict[str, float]


class EnsembleEvaluation(Callback):
    r"""Score the Bayesian model average of the collected samples at the end of ``validate`` and ``test``.

    .. math::
        \bar p(y \mid x) = \frac1K \sum_{s=1}^K \mathrm{softmax}(f_{\theta_s}(x))_y

    Each sample is decoded once per pass straight into the module, which then runs over the stage's dataloaders; kept
    is one sum of probabilities per test point. Weights, buffers, modes and the global random state are as before
    afterwards, also when something raises. In the sanity check nothing happens.

    Logged per dataloader (with the suffix ``/dataloader_idx_i`` if there are several):

    * ``ensemble/accuracy``, ``ensemble/nll``, ``ensemble/brier``, ``ensemble/ece``, ``ensemble/ece_paper`` (the nine
      bins of the published code), ``ensemble/mutual_information`` (mean, in nats), ``ensemble/size``;
    * ``single/...``: the mean over the samples of the score of each alone;
    * ``current/...``: the network as it is now.

    :attr:`curve` has the scores of every sample and of the growing ensemble; outside of a fit they also go to the
    logger as ``ensemble_curve/...`` over the number of samples.

    With a distributed sampler scores are exact: sums are added over ranks, and what the sampler repeats to fill up the
    last batches is counted once.

    Args:
        bank: The samples, or the path of a bank. ``None``: those of the trainer's :class:`SampleCollector`.
        logits: ``"forward"``: a batch is ``(inputs, targets)`` (or a mapping with such keys) and logits are
            ``module(inputs)``. ``"predict_step"``: logits are what ``predict_step`` returns. Or a function
            ``(module, batch) -> (logits, targets)``. Logits have shape ``(batch, classes)``, targets ``(batch,)``.
        stages: In which of ``"validate"`` (also within a fit) and ``"test"`` to evaluate.
        num_bins: Number of equal bins of ``ece``.
        refresh_batch_norm: Number of training batches with which BatchNorm statistics are measured anew for every
            sample; ``None`` takes those stored with it.
        every_n_epochs: Within a fit, evaluate after every n-th epoch only.
        max_samples: Evaluate at most so many, evenly spaced over the bank, the newest included.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If there is no bank to take samples from, or ``trainer.test`` finds it empty.

    Note:
        Within a fit nothing is logged before the first sample; a ``ModelCheckpoint`` that monitors ``ensemble/...``
        has to begin after the burn-in. All loaders of a stage are evaluated one after the other.

    Example:
        >>> EnsembleEvaluation(stages=("test",), num_bins=10).curve
        []
        >>> EnsembleEvaluation(stages=("fit",))
        Traceback (most recent call last):
        ValueError: EnsembleEvaluation: `stages` must be among ('validate', 'test'), got ('fit',).
    """

    def __init__(
        self,
        bank: SampleBank | str | os.PathLike[str] | None = None,
        *,
        logits: LogitsRule = "forward",
        stages: Sequence[Literal["validate", "test"]] = ("validate", "test"),
        num_bins: int = 15,
        refresh_batch_norm: int | None = None,
        every_n_epochs: int = 1,
        max_samples: int | None = None,
    ) -> None:
        self.stages = (stages,) if isinstance(stages, str) else tuple(stages)
        if not self.stages or not set(self.stages) <= {"validate", "test"}:
            raise ValueError(f"EnsembleEvaluation: `stages` must be among ('validate', 'test'), got {self.stages}.")
        if not callable(logits) and logits not in ("forward", "predict_step"):
            raise ValueError(
                f"EnsembleEvaluation: `logits` must be 'forward', 'predict_step' or a function, got {logits!r}."
            )
        counts = {"num_bins": num_bins, "every_n_epochs": every_n_epochs}
        optional = {"refresh_batch_norm": refresh_batch_norm, "max_samples": max_samples}
        counts |= {name: value for name, value in optional.items() if value is not None}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"EnsembleEvaluation: `{name}` must be an int >= 1, got {value!r}.")
        self.source = bank
        self.logits: LogitsRule = logits
        self.num_bins = num_bins
        self.refresh_batch_norm = refresh_batch_norm
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        #: One dict per dataloader and number of samples: ``dataloader_idx``, ``index``, ``size``, ``step``, ``chain``,
        #: and the scores as ``sample/...`` and ``ensemble/...``; of the last evaluation.
        self.curve: list[dict[str, Any]] = []
        #: Reliability diagram of the full ensemble, one per dataloader; of the last evaluation.
        self.reliability: list[ReliabilityBins] = []
        #: What the last evaluation logged.
        self.scores: Scores = {}

    # ------------------------------------------------------------------------------------------------------ the run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer without samples to evaluate."""
        if self.source is None and len(_collectors(trainer)) != 1:
            raise RuntimeError(
                f"EnsembleEvaluation() takes the samples of the trainer's SampleCollector, and there are "
                f"{len(_collectors(trainer))} of them. Add one to `callbacks`, or pass EnsembleEvaluation(bank=...)."
            )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate if it is this epoch's turn."""
        fitting = trainer.state.fn == "fit"
        turn = not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if "validate" in self.stages and not trainer.sanity_checking and turn:
            self._evaluate(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate."""
        if "test" in self.stages:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bank = self._bank(trainer)
        if bank is None:
            return
        self.curve, self.scores, self.reliability = [], {}, []
        loaders = stage_loaders(trainer)
        with untouched_random_state():  # dataloaders draw seeds: training must not depend on whether it is watched
            for number, (loader, limit) in enumerate(loaders):
                batches = EvaluationBatches(trainer, loader, limit, number, self.logits)
                suffix = f"/dataloader_idx_{number}" if len(loaders) > 1 else ""
                scores = self._evaluate_loader(trainer, pl_module, bank, batches)
                self.scores.update({name + suffix: value for name, value in scores.items()})
        self._log(trainer, pl_module)

    def _evaluate_loader(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, bank: _Selection, batches: EvaluationBatches
    ) -> Scores:
        metrics = functools.partial(_metrics, num_bins=self.num_bins)
        refresh = self.refresh_batch_norm
        training = None if refresh is None else TrainingBatches(trainer, refresh, self.logits)
        current = _current_scores(pl_module, batches, self.num_bins)
        result = bayesian_model_average(
            cast(SampleBank, bank),
            pl_module,
            batches,
            logits=logits_of,
            targets=targets_of,
            refresh_batch_norm=training,
            metrics=metrics,
            device=pl_module.device,
        )
        self.reliability.append(_reliability(result.predictive, self.num_bins))
        self.curve += [_point(r, k, bank, batches.loader_index) for k, r in enumerate(result.history, start=1)]
        single = {name: _mean([r.sample[name] for r in result.history]) for name in result.scores}
        scores = {f"ensemble/{name}": value for name, value in result.scores.items()}
        scores["ensemble/mutual_information"] = _mean_mutual_information(trainer, result)
        scores["ensemble/size"] = float(len(bank))
        scores |= {f"single/{name}": value for name, value in single.items()}
        return scores | {f"current/{name}": value for name, value in current.items()}

    # ---------------------------------------------------------------------------------------------------- the samples

    def _bank(self, trainer: pl.Trainer) -> _Selection | None:
        """The samples to evaluate; ``None`` where their absence is no error."""
        try:
            bank = opened_alike(lambda: self._open(trainer))
        except RanksDisagreeError:
            raise
        except BankError as error:
            if trainer.testing:
                raise
            if trainer.state.fn != "fit":
                rank_zero_warn(f"EnsembleEvaluation has nothing to evaluate: {error}")
            return None
        if len(bank):
            return _Selection(bank, self.max_samples)
        if trainer.testing:
            raise RuntimeError(
                f"EnsembleEvaluation has nothing to test: {bank!r}. Fit with a SampleCollector first, test with the "
                "same callbacks or from a checkpoint, or pass EnsembleEvaluation(bank='path of a bank')."
            )
        if trainer.state.fn != "fit":
            rank_zero_warn(f"EnsembleEvaluation has nothing to evaluate: {bank!r}.")
        return None

    def _open(self, trainer: pl.Trainer) -> SampleBank:
        if isinstance(self.source, SampleBank):
            return self.source
        if self.source is None:
            return _collectors(trainer)[0].bank
        return SampleBank.open(self.source, verify=False)

    # ------------------------------------------------------------------------------------------------------- logging

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.barebones:  # has no logging; `scores` and `curve` are there all the same
            return
        # all ranks have the same values; `sync_dist` only keeps Lightning from warning that they might not
        pl_module.log_dict(
            self.scores, on_step=False, on_epoch=True, sync_dist=True, add_dataloader_idx=False, batch_size=1
        )
        if trainer.state.fn == "fit":
            return
        several = len({point["dataloader_idx"] for point in self.curve}) > 1
        for point in self.curve:
            suffix = f"/dataloader_idx_{point['dataloader_idx']}" if several else ""
            values = {
                f"ensemble_curve/{key.replace('sample/', 'sample_').removeprefix('ensemble/')}{suffix}": value
                for key, value in point.items()
                if "/" in key
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, step=point["size"])


class _Selection:
    """At most ``limit`` samples of a bank, evenly spaced, the newest included; what a Bayesian model average reads."""

    def __init__(self, bank: SampleBank, limit: int | None) -> None:
        n, k = len(bank), len(bank) if limit is None else min(limit, len(bank))
        self.bank = bank
        self.indices = [n - 1 - (i * n) // k for i in reversed(range(k))]

    @property
    def infos(self) -> list[SampleInfo]:
        infos = self.bank.infos
        return [infos[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load_into(self, module: torch.nn.Module, index: int) -> None:
        self.bank.load_into(module, self.indices[index])


def _collectors(trainer: pl.Trainer) -> list[SampleCollector]:
    return [callback for callback in trainer.callbacks if isinstance(callback, SampleCollector)]  # type: ignore[attr-defined]


def _metrics(num_classes: int, num_bins: int) -> MetricCollection:
    metrics = default_metrics(num_classes)
    metrics["ece"] = CalibrationError(num_bins=num_bins)
    return metrics


def _reliability(predictive: PosteriorPredictive, num_bins: int) -> ReliabilityBins:
    """Confidence and accuracy per bin over all test points of all ranks."""
    calibration = CalibrationError(num_bins=num_bins)
    for probabilities, truth in predictive.batches():
        assert truth is not None
        calibration.to(probabilities.device).update(probabilities, truth)
    with calibration.sync_context():
        return calibration.reliability()


@torch.no_grad()
def _current_scores(module: pl.LightningModule, batches: EvaluationBatches, num_bins: int) -> Scores:
    """Scores of the weights that the module has now."""
    metrics: MetricCollection | None = None
    for item in batches:
        probabilities = probabilities_of(logits_of(module, item))
        if metrics is None:
            metrics = _metrics(probabilities.shape[1], num_bins).to(probabilities.device)
        metrics.update(probabilities, targets_of(item))
    return {} if metrics is None else {name: float(value) for name, value in metrics.compute().items()}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_mutual_information(trainer: pl.Trainer, result: EnsembleResult) -> float:
    points = result.predictive.mutual_information
    sums = torch.tensor([float(points.sum()), float(len(points))], dtype=torch.float64, device=points.device)
    total, count = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
    return float(total / count)


def _point(result: SampleResult, size: int, bank: _Selection, loader_index: int) -> dict[str, Any]:
    point: dict[str, Any] = {
        "dataloader_idx": loader_index,
        "index": bank.indices[result.index],
        "size": size,
        "step": result.info.step,
        "chain": result.info.chain,
    }
    point |= {f"sample/{name}": value for name, value in result.sample.items()}
    return point | {f"ensemble/{name}": value for name, value in result.ensemble.items()}
