"""Bayesian model average over a bank: samples are the outer loop, batches the inner one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_lpsgld.bank import SampleInfo
from lightning_lpsgld.metrics import BrierScore, CalibrationError, CategoricalNLL
from lightning_lpsgld.predictive.batch_norm import refresh_batch_norm as refresh
from lightning_lpsgld.predictive.batches import default_logits, default_targets, device_of, to_device
from lightning_lpsgld.predictive.ensemble import PosteriorPredictive, probabilities_of
from lightning_lpsgld.predictive.swap import swapped_weights

__all__ = ["EnsembleResult", "SampleResult", "SampleSource", "bayesian_model_average", "default_metrics"]

Metrics = Callable[[int], MetricCollection]


class SampleSource(Protocol):
    """What an average is taken over: a :class:`~lightning_lpsgld.bank.SampleBank`, or a part of one."""

    @property
    def infos(self) -> list[SampleInfo]:
        """Metadata of all samples, in the order of their index."""

    def __len__(self) -> int: ...

    def load_into(self, module: nn.Module, index: int) -> None:
        """Write sample number ``index`` into the tensors of ``module``."""


def default_metrics(num_classes: int) -> MetricCollection:
    """Accuracy, NLL, Brier score, ECE with 15 bins and the published code's, on probabilities and targets.

    Args:
        num_classes: Number of classes.

    Returns:
        Metrics called ``accuracy``, ``nll``, ``brier``, ``ece`` and ``ece_paper``; all states are sums.
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "nll": CategoricalNLL(),
            "brier": BrierScore(),
            "ece": CalibrationError(num_bins=15),
            "ece_paper": CalibrationError(variant="paper"),
        },
        compute_groups=False,
    )


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
        predictive: Mean probabilities and entropies per test point.
        history: One result per sample, in order; the scores of the full ensemble are the last one's.
    """

    predictive: PosteriorPredictive
    history: list[SampleResult]

    @property
    def scores(self) -> dict[str, float]:
        """Scores of the full ensemble."""
        return self.history[-1].ensemble


class _Scorer:
    """Metrics that are made when the number of classes is known, and passed over where there are no targets."""

    def __init__(self, build: Metrics | None) -> None:
        self.build = build
        self.metrics: MetricCollection | None = None

    def update(self, probabilities: Tensor, targets: Tensor | None) -> None:
        if self.build is None or targets is None:
            return
        if self.metrics is None:
            self.metrics = self.build(probabilities.shape[1])
        self.metrics.to(probabilities.device).update(probabilities, targets)

    def update_all(self, predictive: PosteriorPredictive) -> None:
        if self.build is not None:
            for probabilities, targets in predictive.batches():
                self.update(probabilities, targets)

    def finish(self) -> dict[str, float]:
        """Scores since the last call; with ``torch.distributed`` initialized, of all ranks together."""
        if self.metrics is None:
            return {}
        scores = {name: float(value) for name, value in self.metrics.compute().items()}
        self.metrics.reset()
        return scores


def bayesian_model_average(
    bank: SampleSource,
    module: nn.Module,
    batches: Iterable[Any],
    *,
    logits: Callable[[nn.Module, Any], Tensor] = default_logits,
    targets: Callable[[Any], Tensor | None] = default_targets,
    refresh_batch_norm: Iterable[Any] | None = None,
    metrics: Metrics | None = default_metrics,
    on_sample: Callable[[SampleResult], None] | None = None,
    predictive: PosteriorPredictive | None = None,
    device: torch.device | str | None = None,
) -> EnsembleResult:
    r"""Average the predicted probabilities of all samples of a bank, one sample in memory at a time.

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
        logits: Called as ``logits(module, batch)``, returns shape ``(n, classes)``. By default ``module(inputs)`` with
            the first element of a tuple or list, or a mapping's ``inputs``, ``x``, ``image`` or the like.
        targets: Called as ``targets(batch)``, returns shape ``(n,)`` or ``None``. By default the second element, or a
            mapping's ``targets``, ``labels``, ``y`` or the like.
        refresh_batch_norm: Training batches with which BatchNorm statistics are measured anew for every sample, by
            :func:`~lightning_lpsgld.predictive.refresh_batch_norm` through ``logits``; ``None`` takes those stored.
        metrics: Builds, from the number of classes, what is scored; ``None``: nothing.
        on_sample: Called after every sample, while the module still holds it.
        predictive: Sums to add to; empty ones by default.
        device: Where batches are moved; the module's device by default.

    Returns:
        Sums per test point and scores of every sample and of the growing ensemble.

    Raises:
        ValueError: If the bank is empty, or ``batches`` change between samples.
        BankError: If the module is not the one that was sampled, or a file is damaged.

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
    predictive = PosteriorPredictive() if predictive is None else predictive
    target = device_of(module) if device is None else device
    single, ensemble = _Scorer(metrics), _Scorer(metrics)
    history = []
    with torch.no_grad(), swapped_weights(module):
        for index, info in enumerate(bank.infos):
            bank.load_into(module, index)
            module.eval()
            if refresh_batch_norm is not None:
                refresh(module, refresh_batch_norm, forward=logits, device=target)
            _pass_over(batches, module, logits, targets, target, predictive, single)
            ensemble.update_all(predictive)
            history.append(SampleResult(index, info, single.finish(), ensemble.finish()))
            if on_sample is not None:
                on_sample(history[-1])
    return EnsembleResult(predictive, history)


def _pass_over(
    batches: Iterable[Any],
    module: nn.Module,
    logits: Callable[[nn.Module, Any], Tensor],
    targets: Callable[[Any], Tensor | None],
    device: torch.device | str,
    predictive: PosteriorPredictive,
    scorer: _Scorer,
) -> None:
    """One sample over all batches."""
    for number, batch in enumerate(batches):
        batch = to_device(batch, device)
        probabilities, truth = probabilities_of(logits(module, batch)), targets(batch)
        predictive.update(number, probabilities, truth)
        scorer.update(probabilities, truth)
    predictive.end_sample()
