"""Bayesian model average over a bank: samples are the outer loop, batches the inner one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_lpsgld.arithmetic import Arithmetic
from lightning_lpsgld.bank import SampleInfo
from lightning_lpsgld.predictive.batch_norm import refresh_batch_norm as refresh
from lightning_lpsgld.predictive.batches import default_logits, default_targets, device_of, to_device
from lightning_lpsgld.predictive.integers import layer_arithmetic
from lightning_lpsgld.predictive.reading import TaskName, TaskReader
from lightning_lpsgld.predictive.running import ChangedBatchesError, RunningPredictive
from lightning_lpsgld.predictive.scoring import Metrics, Scorer, default_metrics, further_scores, regression_metrics
from lightning_lpsgld.predictive.swap import swapped_weights
from lightning_lpsgld.predictive.tasks import Regression, Task

__all__ = [
    "EnsembleResult",
    "NonFinitePredictionError",
    "SampleResult",
    "SampleSource",
    "bayesian_model_average",
]


class SampleSource(Protocol):
    """What an average is taken over: a :class:`~lightning_lpsgld.bank.SampleBank`, or a part of one."""

    @property
    def infos(self) -> list[SampleInfo]:
        """Metadata of all samples, in the order of their index."""

    def __len__(self) -> int: ...

    def load_into(self, module: nn.Module, index: int) -> None:
        """Write sample number ``index`` into the tensors of ``module``."""


@dataclass(frozen=True)
class SampleResult:
    """What one more sample brought.

    Attributes:
        index: Its index in the bank.
        info: Its metadata.
        sample: Scores of this sample alone, by name; empty without targets.
        ensemble: Scores of the mean over all samples so far.
    """

    index: int
    info: SampleInfo
    sample: dict[str, float] = field(default_factory=dict)
    ensemble: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EnsembleResult:
    """Bayesian model average over a bank.

    Attributes:
        predictive: Sums per test point: a :class:`~.ensemble.PosteriorPredictive` (mean probabilities, entropies), or
            of a regression a :class:`~.mixtures.MixturePredictive` (mean, variances, intervals).
        history: One result per sample, in order; the scores of the full ensemble are the last one's.
        task: What is predicted.
    """

    predictive: Any
    history: list[SampleResult]
    task: Task

    @property
    def scores(self) -> dict[str, float]:
        """Scores of the full ensemble."""
        return self.history[-1].ensemble

    @property
    def ambiguity(self) -> float:
        """Mean NLL of the samples minus NLL of the ensemble, in nats: what averaging gains; NaN without scores."""
        members = [result.sample.get("nll", math.nan) for result in self.history]
        return math.fsum(members) / len(members) - self.scores.get("nll", math.nan)

    def further_scores(self, num_bins: int = 15) -> dict[str, float]:
        """Scores that are made of the full ensemble only; see :func:`~lightning_lpsgld.predictive.further_scores`."""
        return further_scores(self.task, self.predictive, num_bins)


class NonFinitePredictionError(ValueError):
    """A sample predicts NaN or infinity: in an average it would hide behind finite scores, or spoil them.

    Attributes:
        points: How many predictions are not finite.
        scores: Names of the scores that there would be.
    """

    def __init__(self, message: str, points: int, scores: list[str]) -> None:
        super().__init__(message)
        self.points, self.scores = points, scores


def bayesian_model_average(
    bank: SampleSource,
    module: nn.Module,
    batches: Iterable[Any],
    *,
    logits: Callable[[nn.Module, Any], Any] = default_logits,
    targets: Callable[[Any], Tensor | None] = default_targets,
    refresh_batch_norm: Iterable[Any] | None = None,
    metrics: Metrics | None = default_metrics,
    on_sample: Callable[[SampleResult], None] | None = None,
    predictive: RunningPredictive | None = None,
    device: torch.device | str | None = None,
    task: TaskName | Task | TaskReader = "auto",
    ignore_index: int | None = None,
    arithmetic: Arithmetic = "auto",
) -> EnsembleResult:
    r"""Average the predictions of all samples of a bank, one sample in memory at a time.

    .. math::
        \bar p(y \mid x) = \frac1K \sum_{s=1}^K \mathrm{softmax}(f_{\theta_s}(x))_y

    Every sample is decoded straight into the parameters of ``module`` and passes once over ``batches`` in evaluation
    mode. Softmax is taken in float32, sums in the dtype of ``predictive`` (float64 by default). Beside the module there
    are in memory: a copy of its own weights, the stored form of one sample, and the sums per test point. Weights,
    buffers and modes are put back bit for bit, also when something in the loop raises.

    Args:
        bank: The samples; at least one. A :class:`~lightning_lpsgld.bank.SampleBank`, or anything with its ``infos``,
            ``load_into`` and length.
        module: Module of the same names, shapes and dtypes.
        batches: Test batches; iterated once per sample, so not a generator, and not shuffled.
        logits: Called as ``logits(module, batch)``, returns logits, means, or means with variances: tensors, or what
            :func:`~lightning_lpsgld.predictive.read_output` finds them in. By default ``module(inputs)`` with the
            first element of a tuple or list, or a mapping's ``inputs``, ``x``, ``image`` or the like.
        targets: Called as ``targets(batch)``, returns a tensor or ``None``. By default the second element, or a
            mapping's ``targets``, ``labels``, ``y`` or the like.
        refresh_batch_norm: Training batches with which BatchNorm statistics are measured anew for every sample, by
            :func:`~lightning_lpsgld.predictive.refresh_batch_norm` through ``logits``; ``None`` takes those stored.
        metrics: Builds, from the number of classes, what is scored; ``None``: nothing. By default
            :func:`~.scoring.default_metrics`, of a regression :func:`~.scoring.regression_metrics`. Others are updated
            with probabilities and targets, in a regression with means and targets.
        on_sample: Called after every sample, while the module still holds it.
        predictive: Sums to add to; empty ones by default.
        device: Where batches are moved; the module's device by default.
        task: ``"multiclass"``, ``"binary"`` (one logit), ``"multilabel"``, ``"regression"``, or a task with its own
            arguments such as :class:`~.tasks.Regression`; ``"auto"``: what the first batch looks like, see
            :func:`~.tasks.decide_task`. Pixels and tokens are points like others: results are flat.
        ignore_index: Target of what does not count; ``None``: -100.
        arithmetic: How layers multiply where an :class:`~lightning_lpsgld.casting.ActivationCasting` is on the module:
            see :func:`~lightning_lpsgld.predictive.layer_arithmetic`.

    Returns:
        Sums per test point and scores of every sample and of the growing ensemble.

    Raises:
        ValueError: If the bank is empty, ``batches`` change between samples, or predictions and targets do not fit the
            task.
        NonFinitePredictionError: If a sample predicts NaN or infinite values.
        BankError: If the module is not the one that was sampled, or a file is damaged.
        ArithmeticRefusal: With ``arithmetic="integer"``, naming a layer that cannot run in integers.

    Note:
        There is no generator form on purpose: an exception in the consumer's loop would keep the generator, and the
        sample's weights in the module, alive as long as its traceback.

    Example:
        >>> import torch
        >>> from lightning_lpsgld.bank import SampleBank
        >>> module, bank = torch.nn.Linear(2, 3), SampleBank()
        >>> for step in range(2):
        ...     _ = torch.nn.init.normal_(module.weight)
        ...     _ = bank.add(module, step=step)
        >>> result = bayesian_model_average(bank, module, [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))])
        >>> result.predictive.probabilities.shape, sorted(result.scores)
        (torch.Size([4, 3]), ['accuracy', 'brier', 'ece', 'ece_paper', 'nll'])
    """
    if len(bank) == 0:
        raise ValueError("The bank holds no usable sample; collect samples first (or look at `bank.damaged`).")
    target = device_of(module) if device is None else device
    reader = task if isinstance(task, TaskReader) else TaskReader(task, ignore_index)
    average = _Average(reader, predictive, metrics)
    with torch.no_grad(), swapped_weights(module), layer_arithmetic(module, arithmetic):
        for index, info in enumerate(bank.infos):
            bank.load_into(module, index)
            module.eval()
            if refresh_batch_norm is not None:
                refresh(module, refresh_batch_norm, forward=logits, device=target)
            for number, batch in enumerate(batches):
                batch = to_device(batch, target)
                average.add(number, logits(module, batch), targets(batch))
            average.end_sample(index, info)
            if on_sample is not None:
                on_sample(average.history[-1])
    return average.result()


class _Average:
    """Sums and scores of the samples so far."""

    def __init__(self, reader: TaskReader, running: RunningPredictive | None, metrics: Metrics | None) -> None:
        self.reader, self.running, self.metrics = reader, running, metrics
        self.history: list[SampleResult] = []
        self._scorers: tuple[Scorer, Scorer] | None = None
        self._unusable = 0

    def add(self, number: int, output: Any, truth: Tensor | None) -> None:
        """One batch of the current sample."""
        prediction, truth = self.reader.read(output, truth)
        task = self.reader.task
        assert task is not None
        if self._scorers is None:
            own = isinstance(task, Regression) and self.metrics is default_metrics
            build: Metrics | None = regression_metrics if own else self.metrics
            self._scorers = Scorer(build), Scorer(build)
        self.running = task.running() if self.running is None else self.running
        finite = task.finite(prediction)
        self._unusable += int((~finite).sum())
        self.running.update(number, prediction, truth)
        if truth is not None:
            self._scorers[0].update(task.alone(prediction, truth), truth, finite)

    def end_sample(self, index: int, info: SampleInfo) -> None:
        """Close the sample: its scores, and those of the ensemble with it."""
        if self.running is None or self._scorers is None:
            raise ChangedBatchesError(
                "There is no batch. Pass batches that can be iterated more than once, and not none."
            )
        self.running.end_sample()
        single, ensemble = self._scorers
        scores = single.finish()
        unusable = single.unusable() or self._unusable
        if unusable:
            raise NonFinitePredictionError(
                f"Sample {index} (step {info.step}, chain {info.chain}) predicts NaN or infinite values for {unusable} "
                "points. An average would hide it or be spoilt by it. Take a bank without this sample, or find out why "
                "the run diverged there (a smaller learning rate or temperature).",
                unusable,
                list(scores),
            )
        ensemble.update_all(self.running)
        self.history.append(SampleResult(index, info, scores, ensemble.finish()))

    def result(self) -> EnsembleResult:
        """What there is."""
        assert self.reader.task is not None
        return EnsembleResult(self.running, self.history, self.reader.task)
