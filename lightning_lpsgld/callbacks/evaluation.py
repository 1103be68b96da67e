"""Scores of the ensemble, logged during validation and test."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torchmetrics import MetricCollection

from lightning_lpsgld.arithmetic import Arithmetic, check_choice, summary
from lightning_lpsgld.bank import BankError, SampleBank
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
from lightning_lpsgld.callbacks.watching import CurrentWeights, Selection, Watch
from lightning_lpsgld.metrics import CalibrationError, ReliabilityBins
from lightning_lpsgld.predictive import (
    EnsembleResult,
    NonFinitePredictionError,
    PosteriorPredictive,
    Regression,
    RunningPredictive,
    SampleSource,
    Task,
    TaskName,
    TaskReader,
    bayesian_model_average,
    default_metrics,
    diversity_verdict,
    layer_arithmetic,
    regression_metrics,
)
from lightning_lpsgld.predictive.scoring import Metrics

__all__ = ["EnsembleEvaluation"]

#: Key -> value of one dataloader.
Scores = dict[str, float]


class EnsembleEvaluation(Callback):
    r"""Score the Bayesian model average of the collected samples at the end of ``validate`` and ``test``.

    .. math::
        \bar p(y \mid x) = \frac1K \sum_{s=1}^K \mathrm{softmax}(f_{\theta_s}(x))_y

    (of a regression: of densities). Each sample is decoded once per pass straight into the module, which then runs over
    the stage's dataloaders; kept are sums per test point. Within a fit only samples that came since the last validation
    are run. Weights, buffers, modes and the global random state are as before afterwards, also when something raises.
    In the sanity check nothing happens.

    Logged per dataloader (with the suffix ``/dataloader_idx_i`` if there are several):

    * of classes ``ensemble/accuracy``, ``ensemble/nll``, ``ensemble/brier``, ``ensemble/ece``, ``ensemble/ece_paper``
      (the nine bins of the published code), ``ensemble/ece_adaptive`` (bins of equal mass), ``ensemble/ece_classwise``,
      ``ensemble/calibrated_nll`` (at the best temperature), ``ensemble/aurc``, ``ensemble/coverage_at_risk_5``,
      ``ensemble/disagreement`` and ``ensemble/mutual_information`` (mean, in nats);
    * of numbers ``ensemble/rmse``, ``ensemble/nll``, ``ensemble/crps``, ``ensemble/coverage_50``, ``_90``, ``_95``,
      ``ensemble/width_50``, ``_90``, ``_95``, ``ensemble/quantile_error``, ``ensemble/epistemic``,
      ``ensemble/aleatoric``;
    * always ``ensemble/ambiguity`` (mean NLL of the samples minus that of the ensemble) and ``ensemble/size``, which is
      0 in a fit that has no sample yet: then ``ensemble/...`` are the scores of the current weights;
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
            ``(module, batch) -> (logits, targets)``. Logits, or means, are tensors, or in a mapping or an object under
            ``logits``, or ``mean`` and ``variance``, ``log_variance`` or ``scale``.
        stages: In which of ``"validate"`` (also within a fit) and ``"test"`` to evaluate.
        num_bins: Number of equal bins of ``ece``.
        refresh_batch_norm: Number of training batches with which BatchNorm statistics are measured anew for every
            sample; ``None`` takes those stored with it.
        every_n_epochs: Within a fit, evaluate after every n-th epoch only.
        max_samples: Evaluate at most so many, evenly spaced over the bank, the newest included.
        task: ``"multiclass"`` (of points, pixels or tokens; soft targets, too), ``"binary"`` (one logit),
            ``"multilabel"``, ``"regression"``, or a task with arguments of its own, such as
            :class:`~lightning_lpsgld.predictive.Regression`. ``"auto"``: what the first batch looks like.
        ignore_index: Target of points that do not count; ``None``: -100 for classes, nothing for numbers.
        arithmetic: How layers multiply, of samples and of the network as it is now: ``"auto"``: codes, layer by layer,
            where integer products are exact and faster; ``"integer"``: codes in every linear and convolution layer but
            the first, or an error that names the layer; ``"simulated"``: floats (as far as the plugin's own
            ``arithmetic`` leaves it). See :attr:`layers`.
        metrics: Scores of your own beside these: number of classes -> ``MetricCollection``, logged by its names.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If there is no bank to take samples from, or ``trainer.test`` finds it empty.

    Note:
        The first validation of a fit is always evaluated, whatever ``every_n_epochs``, so that a ``ModelCheckpoint`` or
        ``EarlyStopping`` that monitors ``ensemble/...`` finds its key. All loaders of a stage are evaluated one after
        the other.

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
        task: TaskName | Task = "auto",
        ignore_index: int | None = None,
        arithmetic: Arithmetic = "auto",
        metrics: Metrics | None = None,
    ) -> None:
        check_choice("EnsembleEvaluation", arithmetic)
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
        self.task, self.ignore_index = task, ignore_index
        self._reader()  # refuses an unknown task
        self.arithmetic: Arithmetic = arithmetic
        self.metrics = metrics
        #: Layer -> ``"integer"``, or why it was simulated; of the last evaluation, empty where all was simulated.
        self.layers: dict[str, str] = {}
        #: One dict per dataloader and number of samples: ``dataloader_idx``, ``index``, ``size``, ``step``, ``chain``,
        #: and the scores as ``sample/...`` and ``ensemble/...``; of the last evaluation.
        self.curve: list[dict[str, Any]] = []
        #: Reliability diagram of the full ensemble, one per dataloader; of the last evaluation.
        self.reliability: list[ReliabilityBins] = []
        #: What the last evaluation logged.
        self.scores: Scores = {}
        #: What the last evaluation has to say about samples that are too alike; one sentence per dataloader at most.
        self.verdicts: list[str] = []
        self._watches: dict[int, Watch] = {}
        self._train_loader: Any = None

    # ------------------------------------------------------------------------------------------------------ the run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer without samples to evaluate."""
        if self.source is None and len(_collectors(trainer)) != 1:
            raise RuntimeError(
                f"EnsembleEvaluation() takes the samples of the trainer's SampleCollector, and there are "
                f"{len(_collectors(trainer))} of them. Add one to `callbacks`, or pass EnsembleEvaluation(bank=...)."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew: sums of an earlier fit are of other samples."""
        self._watches = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the training data, which ``trainer.test`` does not know when ``fit`` got it as an argument."""
        self._train_loader = trainer.train_dataloader

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the sums per point go."""
        self._watches = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate if it is this epoch's turn, and at the first validation."""
        fitting = trainer.state.fn == "fit"
        turn = not fitting or not self._watches or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if "validate" in self.stages and not trainer.sanity_checking and turn:
            self._evaluate(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate."""
        if "test" in self.stages:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bank = self._bank(trainer)
        if bank is None and trainer.state.fn != "fit":
            return
        self.curve, self.scores, self.reliability, self.verdicts = [], {}, [], []
        loaders = stage_loaders(trainer)
        integers = layer_arithmetic(pl_module, self.arithmetic)
        # dataloaders draw seeds: training must not depend on whether it is watched
        with untouched_random_state(), integers as layers:
            for number, (loader, limit) in enumerate(loaders):
                suffix = f"/dataloader_idx_{number}" if len(loaders) > 1 else ""
                scores = self._evaluate_loader(
                    trainer, pl_module, bank, self._watch(trainer, number, loader, limit), number
                )
                self.scores.update({name + suffix: value for name, value in scores.items()})
        self.layers = {} if layers is None else layers.report()
        if self.layers and trainer.state.fn != "fit":
            rank_zero_info(f"EnsembleEvaluation: {summary(self.layers)}.")
        self._log(trainer, pl_module)

    def _evaluate_loader(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        bank: Selection | None,
        watch: Watch,
        number: int,
    ) -> Scores:
        batches = EvaluationBatches(
            trainer, watch.loader, watch.limit, number, self.logits, watch.reader, watch.generator_state
        )
        average = functools.partial(self._average, pl_module, batches, watch.reader)
        now = self._current(average, trainer.global_step)
        current = {f"current/{name}": value for name, value in now[0].items()}
        if bank is None:
            untried = {"ambiguity": 0.0, "size": 0.0}
            further = {} if now[1] is None else now[1].further_scores(self.num_bins)
            return {f"ensemble/{name}": v for name, v in (now[0] | further | untried).items()} | current
        training = None
        if self.refresh_batch_norm is not None:
            training = TrainingBatches(
                trainer, self.refresh_batch_norm, self.logits, watch.reader, self._train_loader, watch.generator_state
            )
        result = watch.extend(bank, functools.partial(average, training=training))
        return self._ensemble_scores(result, bank, number) | current

    def _ensemble_scores(self, result: EnsembleResult, bank: Selection, number: int) -> Scores:
        if isinstance(result.predictive, PosteriorPredictive):
            self.reliability.append(_reliability(result.predictive, self.num_bins))
        self.curve += [bank.point(r, k, number) for k, r in enumerate(result.history, start=1)]
        single = {name: _mean([r.sample[name] for r in result.history]) for name in result.scores}
        ensemble = result.scores | result.further_scores(self.num_bins)
        ensemble |= {"ambiguity": result.ambiguity, "size": float(len(bank))}
        verdict = diversity_verdict(ensemble, single["nll"])
        if verdict is not None:
            self.verdicts.append(verdict)
        scores = {f"ensemble/{name}": value for name, value in ensemble.items()}
        return scores | {f"single/{name}": value for name, value in single.items()}

    def _average(
        self,
        module: pl.LightningModule,
        batches: EvaluationBatches,
        reader: TaskReader,
        samples: SampleSource,
        running: RunningPredictive | None = None,
        training: TrainingBatches | None = None,
    ) -> EnsembleResult:
        return bayesian_model_average(
            samples,
            module,
            batches,
            logits=logits_of,
            targets=targets_of,
            refresh_batch_norm=training,
            metrics=functools.partial(_metrics, reader=reader, num_bins=self.num_bins, own=self.metrics),
            predictive=running,
            device=module.device,
            task=reader,
            arithmetic="simulated",  # decided around all passes, in `_evaluate`
        )

    def _current(self, average: Any, step: int) -> tuple[Scores, EnsembleResult | None]:
        """Scores of the weights that the module has now; NaN, and a word, where they do not predict."""
        try:
            result = average(CurrentWeights(step))
        except NonFinitePredictionError as error:
            rank_zero_warn(
                f"EnsembleEvaluation: the current weights (step {step}) predict NaN or infinite values for "
                f"{error.points} points; their scores are NaN."
            )
            return dict.fromkeys(error.scores, math.nan), None
        return result.scores, result

    def _reader(self) -> TaskReader:
        return TaskReader(self.task, self.ignore_index, rank_zero_warn)

    def _watch(self, trainer: pl.Trainer, number: int, loader: Any, limit: float) -> Watch:
        """What is known of a loader from earlier in this fit, or else nothing."""
        known = self._watches.get(number)
        if trainer.state.fn != "fit" or known is None or known.loader is not loader or known.limit != limit:
            known = Watch(loader, limit, self._reader())
        if trainer.state.fn == "fit":
            self._watches[number] = known
        return known

    # ---------------------------------------------------------------------------------------------------- the samples

    def _bank(self, trainer: pl.Trainer) -> Selection | None:
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
            return Selection(bank, self.max_samples)
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
        for verdict in self.verdicts:
            rank_zero_warn(f"EnsembleEvaluation: {verdict}")
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


def _collectors(trainer: pl.Trainer) -> list[SampleCollector]:
    return [callback for callback in trainer.callbacks if isinstance(callback, SampleCollector)]  # type: ignore[attr-defined]


def _metrics(num_classes: int, reader: TaskReader, num_bins: int, own: Metrics | None) -> MetricCollection:
    regression = isinstance(reader.task, Regression)
    metrics = regression_metrics() if regression else default_metrics(num_classes)
    metrics.add_metrics({} if regression else {"ece": CalibrationError(num_bins=num_bins)})
    metrics.add_metrics({} if own is None else dict(own(num_classes).items()))
    return metrics


def _reliability(predictive: PosteriorPredictive, num_bins: int) -> ReliabilityBins:
    """Confidence and accuracy per bin over all test points of all ranks."""
    calibration = CalibrationError(num_bins=num_bins)
    for probabilities, truth in predictive.batches():
        assert truth is not None
        calibration.to(probabilities.device).update(probabilities, truth)
    with calibration.sync_context():
        return calibration.reliability()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
