"""What test data say about the samples, whatever the task: scores, curves, and where they are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.metrics import MixturePoints, QuantileCalibration
from lightning_lpsgld.metrics.functional import reliability_bins
from lightning_lpsgld.predictive import (
    EnsembleResult,
    Multiclass,
    PosteriorPredictive,
    Regression,
    Task,
    TaskReader,
    bayesian_model_average,
    default_inputs,
    default_targets,
    swapped_weights,
)
from lightning_lpsgld.predictive.batches import DataError, by_keyword, required_targets
from lightning_lpsgld.predictive.tasks import IGNORED
from lightning_lpsgld.report.charts import Curve

__all__ = ["Evaluation", "Mistake", "evaluate"]

_WORST = 12
_SCATTERED = 400
#: Scores whose course over the number of samples is drawn.
_DRAWN = {"error": "Error", "nll": "NLL", "rmse": "RMSE", "crps": "CRPS"}


@dataclass(frozen=True)
class Mistake:
    """An input on which the ensemble is wrong.

    Attributes:
        index: Number of the test input.
        text: What was said, and the truth.
        size: Probability of the wrong class; share of the input's points that are wrong; or the error of a number in
            predicted standard deviations.
        image: The input where it is an image, shape ``(channels, height, width)``.
    """

    index: int
    text: str
    size: float
    image: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """What test data say.

    Attributes:
        task: Name of the task.
        scores: Score by name, of the single samples (mean; NaN: there is none) and of the ensemble.
        growth: Scores of the ensemble of the first k samples, k = 1, 2, ...
        curves: What is drawn.
        distance: Of each sample from the ensemble: share of points with another class, or root of the mean squared
            difference of means.
        mistakes: The worst ones first.
    """

    task: str
    scores: dict[str, tuple[float, float]]
    growth: list[dict[str, float]]
    curves: list[Curve]
    distance: list[float]
    mistakes: list[Mistake] = field(default_factory=list)


class _Answers(PosteriorPredictive):
    """Also keeps the class that each sample gives to each point."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[list[Tensor]] = []

    def update(self, index: int, prediction: Tensor, targets: Tensor | None = None) -> None:
        super().update(index, prediction, targets)
        if index == 0:
            self.answers.append([])
        self.answers[-1].append(prediction.argmax(1).to(torch.int32).cpu())


def _decided(
    bank: SampleBank, module: nn.Module, batch: Any, task: Any, logits: Callable[[nn.Module, Any], Any]
) -> Task:
    """The task, as the first sample's output for a batch looks."""
    reader = TaskReader(task, say=lambda message: None)
    with torch.no_grad(), swapped_weights(module):
        bank.load_into(module, 0)
        module.eval()
        reader.read(logits(module, batch), default_targets(batch))
    assert reader.task is not None
    return reader.task


def _plain(scores: dict[str, float]) -> dict[str, float]:
    """Scores as a report names them: an error, lower is better, in place of an accuracy."""
    scores = {("error" if name == "accuracy" else name): value for name, value in scores.items()}
    if "error" in scores:
        scores["error"] = 1.0 - scores["error"]
    scores.pop("ece_paper", None)
    return scores


def _scores(result: EnsembleResult) -> dict[str, tuple[float, float]]:
    single = [_plain(one.sample) for one in result.history]
    whole = _plain(result.scores)
    scores = {name: (math.fsum(row[name] for row in single) / len(single), value) for name, value in whole.items()}
    if isinstance(result.predictive, PosteriorPredictive):
        own, all_ = result.predictive.expected_entropy, result.predictive.predictive_entropy
        scores["entropy"] = (float(own.mean()), float(all_.mean()))
    scores |= {name: (math.nan, value) for name, value in result.further_scores().items()}
    return scores


def _growth_curves(growth: list[dict[str, float]]) -> list[Curve]:
    return [
        Curve(f"{title} against samples", {name: [(k + 1.0, row[name]) for k, row in enumerate(growth)]}, "samples")
        for name, title in _DRAWN.items()
        if name in growth[0]
    ]


def _reliability(p: Tensor, y: Tensor) -> Curve:
    bins = reliability_bins(p, y)
    rows = zip(bins.confidence.tolist(), bins.accuracy.tolist(), bins.count.tolist())
    points = [(confidence, accuracy) for confidence, accuracy, count in rows if count > 0]
    return Curve("Reliability", {"accuracy": points}, "confidence", "accuracy", diagonal=(0.0, 1.0))


def _spread_curve(center: Tensor, sd: Tensor, y: Tensor) -> Curve:
    """Root mean squared error of points of like predicted spread, in five parts."""
    parts = [part for part in sd.argsort().chunk(5) if len(part)]
    points = [(float(sd[i].square().mean().sqrt()), float((center[i] - y[i]).square().mean().sqrt())) for i in parts]
    top = max(max(point) for point in points)
    return Curve("Error against predicted spread", {"rmse of a fifth": points}, "predicted sd", diagonal=(0.0, top))


def _numbers(points: Sequence[MixturePoints]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and target of all points."""
    center, y = (torch.cat([getattr(p, name).double().cpu() for p in points]) for name in ("center", "targets"))
    return center, torch.cat([(p.epistemic + p.aleatoric).sqrt().cpu() for p in points]), y


def _number_curves(points: Sequence[MixturePoints]) -> list[Curve]:
    metric = QuantileCalibration()
    for part in points:
        metric.to(part.pit.device).update(part)
    below = list(zip(metric.promised.tolist(), metric.observed().tolist()))
    pit, (center, sd, y) = torch.cat([part.pit.cpu() for part in points]), _numbers(points)
    levels = [level / 20 for level in range(1, 20)]
    inside = [(level, float(((pit - 0.5).abs() <= level / 2).double().mean())) for level in levels]
    shown = torch.linspace(0, len(y) - 1, min(len(y), _SCATTERED)).long()
    pairs = list(zip(y[shown].tolist(), center[shown].tolist()))
    ends = (float(min(y.min(), center.min())), float(max(y.max(), center.max())))
    return [
        Curve("Quantiles", {"below": below}, "promised", "share of targets below", diagonal=(0.0, 1.0)),
        Curve("Coverage of central intervals", {"inside": inside}, "promised", "share inside", diagonal=(0.0, 1.0)),
        _spread_curve(center, sd, y),
        Curve("Predictions and truth", {"point": pairs}, "truth", "mean", diagonal=ends, joined=False),
    ]


def _origins(task: Task, targets: Tensor) -> Tensor:
    """Number within its batch of the input that each point, of those that count, belongs to."""
    points = targets.numel()
    if isinstance(task, Multiclass) and targets.is_floating_point():
        points //= targets.shape[1 if task.class_dim is None else task.class_dim]
        return torch.arange(points) // (points // len(targets))
    every = torch.arange(points) // (points // len(targets))
    ignored = task.ignore_index if isinstance(task, Regression) else getattr(task, "ignore_index", None)
    if ignored is None and not isinstance(task, Regression):
        ignored = IGNORED
    return every if ignored is None else every[targets.reshape(-1).cpu() != ignored]


def _wrong_classes(p: Tensor, y: Tensor) -> Iterator[tuple[int, float, str]]:
    """Point, badness and words for each wrong class."""
    truth = y.argmax(1) if y.ndim == 2 else y
    confidence, answer = p.max(1)
    for i in (answer != truth).nonzero().flatten().tolist():
        yield i, float(confidence[i]), f"{int(answer[i])}, truth {int(truth[i])}"


def _far_numbers(center: Tensor, sd: Tensor, y: Tensor) -> Iterator[tuple[int, float, str]]:
    for i, off in enumerate(((center - y).abs() / sd).tolist()):
        yield i, off, f"{float(center[i]):.4g} ± {float(sd[i]):.2g}, truth {float(y[i]):.4g}"


def _mistakes(found: Iterable[tuple[int, float, str]], origins: Tensor, several: bool) -> list[Mistake]:
    """The worst points; where an input has several points, the inputs with most of them wrong."""
    if not several:
        worst = sorted(found, key=lambda one: -one[1])[:_WORST]
        return [Mistake(int(origins[i]), text, size) for i, size, text in worst]
    total = origins.bincount()
    wrong = origins[[i for i, _, _ in found]].bincount(minlength=len(total)).double()
    share = (wrong / total.clamp(min=1)).sort(descending=True, stable=True)
    rows = zip(share.indices[:_WORST].tolist(), share.values[:_WORST].tolist())
    return [Mistake(i, f"{int(wrong[i])} of {int(total[i])} points wrong", s) for i, s in rows if s > 0]


def _with_images(mistakes: list[Mistake], batches: Iterable[Any]) -> list[Mistake]:
    wanted = {mistake.index for mistake in mistakes}
    images: dict[int, Tensor] = {}
    start = 0
    for batch in batches:
        x = default_inputs(batch) if wanted and by_keyword(batch) is None else None
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3):
            return mistakes
        images |= {i: x[i - start].float().cpu() for i in wanted if start <= i < start + len(x)}
        start += len(x)
    return [Mistake(m.index, m.text, m.size, images.get(m.index)) for m in mistakes]


def _distances(result: EnsembleResult, points: Sequence[MixturePoints]) -> list[float]:
    if isinstance(result.predictive, _Answers):
        whole = result.predictive.probabilities.argmax(1).cpu()
        return [float((torch.cat(answers) != whole).double().mean()) for answers in result.predictive.answers]
    apart = torch.cat([(part.mean.double() - part.center).square() for part in points], dim=1)
    return apart.mean(1).sqrt().tolist()


def _named_batches(batches: Iterable[Any]) -> tuple[Any, Any]:
    """Batches that can be passed over again, and the first of them."""
    again = list(batches) if isinstance(batches, Iterator) else batches
    first = next(iter(again), None)
    if first is None:
        raise DataError("report: got no test batch.")
    return again, first


def evaluate(
    bank: SampleBank,
    module: nn.Module,
    batches: Iterable[Any],
    task: Any,
    logits: Callable[[nn.Module, Any], Any],
) -> Evaluation:
    """Average the samples over test data, and collect what a report shows.

    Args:
        bank: The samples.
        module: Built like the one that was sampled.
        batches: Test batches with targets; passed over once a sample.
        task: Name or task; ``"auto"``: what the first batch looks like.
        logits: ``logits(module, batch)`` gives the output.

    Raises:
        ValueError: If the bank is empty, there is no batch, one has no targets, or predictions do not fit the task.
    """
    if not len(bank):
        raise ValueError(f"report: {bank!r} has no usable sample; collect some first.")
    again, first = _named_batches(batches)
    origins, start = [], 0
    if default_targets(first) is not None:
        task = _decided(bank, module, first, task, logits)
    for batch in again:
        truth = required_targets(batch, default_targets, "report", "score")
        origins.append(start + _origins(task, truth))
        start += len(truth)
    sums = None if isinstance(task, Regression) else _Answers()
    result = bayesian_model_average(bank, module, again, logits=logits, task=task, predictive=sums)
    growth = [_plain(one.ensemble) for one in result.history]
    points = list(result.predictive.batches())
    if isinstance(task, Regression):
        mixtures = [part for part, _ in points]
        curves, found = _number_curves(mixtures), _far_numbers(*_numbers(mixtures))
    else:
        p, y = (torch.cat([part[side].cpu() for part in points]) for side in (0, 1))
        mixtures, curves, found = [], [_reliability(p, y)], _wrong_classes(p, y)
    origin = torch.cat(origins)
    several = not isinstance(task, Regression) and len(origin) > start
    return Evaluation(
        task=task.name, scores=_scores(result), growth=growth, curves=[*_growth_curves(growth), *curves],
        distance=_distances(result, mixtures), mistakes=_with_images(_mistakes(found, origin, several), again),
    )  # fmt: skip
