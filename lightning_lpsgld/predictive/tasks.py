"""What is predicted: classes of points, pixels or tokens, yes or no, several labels, or numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_lpsgld.metrics import mixture_points
from lightning_lpsgld.metrics.simplex import warn_of_sigmoids
from lightning_lpsgld.predictive.batches import DataError
from lightning_lpsgld.predictive.ensemble import PosteriorPredictive, probabilities_of
from lightning_lpsgld.predictive.mixtures import MixturePredictive
from lightning_lpsgld.predictive.outputs import GaussianOutput, OutputForm
from lightning_lpsgld.predictive.running import RunningPredictive

__all__ = [
    "IGNORED",
    "Binary",
    "Multiclass",
    "Multilabel",
    "Regression",
    "Task",
    "check_labels",
    "class_dim_of",
    "class_indices",
    "logits_in",
    "same_points",
]

#: What ``cross_entropy`` ignores when nothing is said.
IGNORED = -100
#: Variance of the Gaussian whose negative log likelihood is the squared error (and a constant).
_MSE_VARIANCE = 0.5


class Task(Protocol):
    """How predictions and targets of a batch become predictions and targets of points."""

    name: ClassVar[str]

    @property
    def outputs(self) -> OutputForm:
        """How the module gives its predictions."""

    def read(self, output: Any, targets: Tensor | None) -> tuple[Any, Tensor | None]:
        """Prediction and target of every point that is not ignored, flat."""

    def running(self) -> RunningPredictive:
        """Empty sums for such predictions."""

    def alone(self, prediction: Any, targets: Tensor) -> Any:
        """One sample's prediction in the form that the sums give the ensemble's in."""

    def finite(self, prediction: Any) -> Tensor:
        """Whether each point's prediction is finite, shape ``(points,)``."""


def logits_in(output: Any, name: str) -> Tensor:
    """The output, if it is a floating tensor; else a TypeError that names the task."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        what = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"task={name!r}: logits must be a floating tensor, got {what}.")
    return output


class _ClassTask:
    """Predictions are probabilities of classes, shape ``(points, classes)``."""

    outputs: OutputForm = "auto"

    def running(self) -> RunningPredictive:
        return PosteriorPredictive()

    def alone(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return prediction

    def finite(self, prediction: Tensor) -> Tensor:
        return prediction.isfinite().all(1)


def class_dim_of(logits: Tensor, targets: Tensor) -> int | None:
    """Dim of the classes: the second (as in ``cross_entropy``), else the last; ``None`` where neither fits."""
    if logits.ndim < 2:
        return None
    if targets.shape == (logits.shape[0], *logits.shape[2:]) and logits.shape[1] > 1:
        return 1
    return -1 if targets.shape == logits.shape[:-1] and logits.shape[-1] > 1 else None


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse targets that are no class.

    Args:
        labels: Targets of the points that count, any shape.
        classes: How many there are.

    Raises:
        DataError: If they are no integers, or one is out of range.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"task='multiclass': targets must be integer class indices, got {labels.dtype}.")
    if not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise DataError(
            f"task='multiclass': target {wrong} is no class of {classes} (0 to {classes - 1}). If it marks points "
            f"that do not count, pass ignore_index={wrong}."
        )


@dataclass(frozen=True)
class Multiclass(_ClassTask):
    """One of several classes for every point, pixel or token.

    Args:
        ignore_index: Target of points that do not count; ``None``: -100, as in ``torch.nn.functional.cross_entropy``.
        class_dim: Dim of the logits that holds the classes; ``None``: the second if targets fit that, else the last.

    Logits have shape ``(batch, classes, ...)`` or ``(batch, ..., classes)``, targets ``(batch, ...)`` and integer, or
    the shape of the logits and floating: distributions over the classes.
    """

    name: ClassVar[str] = "multiclass"
    ignore_index: int | None = None
    class_dim: int | None = None

    def probabilities(self, output: Any) -> Tensor:
        """Probabilities with the classes in dim 1, whatever dim of the logits held them: ``(batch, classes, ...)``.

        Raises:
            TypeError: If ``output`` is no floating tensor.
            ValueError: If there are no two classes.
        """
        logits = logits_in(output, self.name)
        dim = 1 if self.class_dim is None else self.class_dim
        if logits.ndim < 2 or logits.shape[dim] < 2:
            raise ValueError(
                f"task='multiclass': logits must have shape (n, classes, ...) with classes >= 2, got "
                f"{tuple(logits.shape)}. Say task='binary' for one logit a point."
            )
        last = logits.movedim(dim, -1)
        return probabilities_of(last.reshape(-1, last.shape[-1])).reshape(last.shape).movedim(-1, 1)

    def read(self, output: Any, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Probabilities, shape ``(points, classes)``, and targets, shape ``(points,)`` or ``(points, classes)``."""
        logits = logits_in(output, self.name)
        soft = targets is not None and targets.is_floating_point() and targets.shape == logits.shape
        dim = self._dim(logits, targets, soft)
        flat = logits.movedim(dim, -1).reshape(-1, logits.shape[dim])
        if targets is None:
            return probabilities_of(flat), None
        if soft:
            return probabilities_of(flat), targets.movedim(dim, -1).reshape(flat.shape)
        labels = targets.reshape(-1)
        keep = labels != (IGNORED if self.ignore_index is None else self.ignore_index)
        if not bool(keep.all()):
            flat, labels = flat[keep], labels[keep]
        check_labels(labels, flat.shape[1])
        return probabilities_of(flat), labels

    def _dim(self, logits: Tensor, targets: Tensor | None, soft: bool) -> int:
        if self.class_dim is not None or targets is None or soft:
            return 1 if self.class_dim is None else self.class_dim
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise TypeError(f"task='multiclass': targets must be integer class indices, got {targets.dtype}.")
        dim = class_dim_of(logits, targets)
        if dim is None:
            raise ValueError(
                f"task='multiclass': logits must have shape (batch, classes), (batch, classes, ...) or (batch, ..., "
                f"classes) with classes >= 2, and targets (batch, ...), got {tuple(logits.shape)} and "
                f"{tuple(targets.shape)}."
            )
        return dim


class _BinaryTask(_ClassTask):
    """A logit of yes for every point; probabilities of no and yes."""

    name: ClassVar[str]
    ignore_index: int | None

    def probabilities(self, output: Any) -> Tensor:
        """Probabilities of no and yes in dim 1: ``(points, 2)``, of several labels ``(batch, 2, labels)``.

        Raises:
            TypeError: If ``output`` is no floating tensor.
        """
        logits = logits_in(output, self.name)
        return _no_and_yes(logits if self.name == "multilabel" else logits.reshape(-1))

    def read(self, output: Any, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Probabilities of no and yes, shape ``(points, 2)``, and targets, shape ``(points,)`` or, soft, the same."""
        logits = logits_in(output, self.name)
        if targets is not None and not same_points(logits, targets):
            raise ValueError(
                f"task={self.name!r}: targets must have the shape of the logits, got {tuple(targets.shape)} and "
                f"{tuple(logits.shape)}."
            )
        flat = logits.reshape(-1)
        labels = None if targets is None else targets.reshape(-1)
        if labels is not None:
            keep = labels != (IGNORED if self.ignore_index is None else self.ignore_index)
            if not bool(keep.all()):
                flat, labels = flat[keep], labels[keep]
        warn_of_sigmoids(flat, self.name)
        return _no_and_yes(flat), None if labels is None else self._labels(labels)

    def _labels(self, labels: Tensor) -> Tensor:
        if bool(((labels < 0) | (labels > 1)).any()):
            wrong = labels[(labels < 0) | (labels > 1)][0].item()
            raise ValueError(
                f"task={self.name!r}: targets are 0 or 1, or probabilities, got {wrong}. If it marks points that do "
                f"not count, pass ignore_index={wrong}."
            )
        if labels.is_floating_point() and not bool(((labels == 0) | (labels == 1)).all()):
            return torch.stack([1.0 - labels, labels], dim=1)
        return labels.long()


def _no_and_yes(logits: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=1)


@dataclass(frozen=True)
class Binary(_BinaryTask):
    """Yes or no, by one logit; logits of shape ``(batch, 1)``, ``(batch,)`` or with further dims (pixels).

    Args:
        ignore_index: Target of points that do not count; ``None``: -100.
    """

    name: ClassVar[str] = "binary"
    ignore_index: int | None = None


@dataclass(frozen=True)
class Multilabel(_BinaryTask):
    """Several independent yes or no; every label of a point counts as a prediction of its own.

    Args:
        ignore_index: Target of labels that do not count; ``None``: -100.
    """

    name: ClassVar[str] = "multilabel"
    ignore_index: int | None = None


def class_indices(targets: Tensor, task: Task | None) -> Tensor:
    """Targets as class indices: those of yes or no may be 0.0 and 1.0, or False and True, as their loss takes them.

    Args:
        targets: Any shape.
        task: The task; ``None``: classes.

    Returns:
        The targets, int64 if the task is yes or no and they are.
    """
    if isinstance(task, Binary) and (not targets.is_floating_point() or bool((targets == targets.round()).all())):
        return targets.long()
    return targets


def same_points(output: Tensor, targets: Tensor) -> bool:
    """Whether shapes agree but for dims of length one."""
    return [n for n in output.shape if n != 1] == [n for n in targets.shape if n != 1]


@dataclass(frozen=True)
class Regression:
    r"""Numbers; every number of a point counts as a prediction of its own.

    Args:
        outputs: What the module gives: ``"auto"`` reads names (``mean`` with ``variance``, ``log_variance`` or
            ``scale``) and Normal distributions, and takes a bare tensor for the mean. ``"mean_variance"`` and
            ``"mean_log_variance"`` are a pair of tensors, or one with two halves along dim 1.
        noise_variance: Variance around a bare mean, in the square of the targets' unit. ``None`` takes 1/2, said once:
            the squared error is the negative log likelihood of that Gaussian, so a posterior sampled with
            ``mse_loss`` assumes it. With a loss of :math:`(y-\mu)^2/(2\sigma^2)` pass :math:`\sigma^2`.
        ignore_index: Target of numbers that do not count; ``None``: all count.

    Raises:
        ValueError: If ``outputs`` is unknown or ``noise_variance`` is not positive.
    """

    name: ClassVar[str] = "regression"
    outputs: OutputForm = "auto"
    noise_variance: float | None = None
    ignore_index: float | None = None

    def __post_init__(self) -> None:
        if self.outputs not in ("auto", "mean", "mean_variance", "mean_log_variance"):
            raise ValueError(
                "Regression: `outputs` must be 'auto', 'mean', 'mean_variance' or 'mean_log_variance', got "
                f"{self.outputs!r}."
            )
        if self.noise_variance is not None and not (
            isinstance(self.noise_variance, (int, float)) and 0.0 < self.noise_variance < math.inf
        ):
            raise ValueError(f"Regression: `noise_variance` must be above 0 and finite, got {self.noise_variance!r}.")

    def read(self, output: Any, targets: Tensor | None) -> tuple[GaussianOutput, Tensor | None]:
        """Mean and variance, shape ``(points,)`` each, and targets, shape ``(points,)``.

        Raises:
            ValueError: If targets have another shape or are not finite, or a variance is not above 0.
        """
        mean = logits_in(output.mean if isinstance(output, GaussianOutput) else output, self.name)
        if isinstance(output, GaussianOutput):
            variance = output.variance.expand_as(mean).reshape(-1)
        else:
            noise = _MSE_VARIANCE if self.noise_variance is None else self.noise_variance
            variance = torch.full_like(mean, noise).reshape(-1)
        if targets is not None and not same_points(mean, targets):
            raise ValueError(
                f"task='regression': targets must have the shape of the means, got {tuple(targets.shape)} and "
                f"{tuple(mean.shape)}."
            )
        mean, numbers = mean.reshape(-1), None if targets is None else targets.reshape(-1)
        if numbers is not None and self.ignore_index is not None:
            keep = numbers != self.ignore_index
            mean, variance, numbers = mean[keep], variance[keep], numbers[keep]
        if numbers is not None and not bool(numbers.isfinite().all()):
            raise ValueError("task='regression': a target is not finite. Mark what does not count by `ignore_index`.")
        if bool((variance <= 0).any()):
            raise ValueError(
                f"task='regression': variances must be above 0, got {variance.min().item():.3g}. A log variance is "
                "given by outputs='mean_log_variance' or under the name 'log_variance'."
            )
        return GaussianOutput(mean, variance), numbers

    def running(self) -> RunningPredictive:
        """Empty mixtures."""
        return MixturePredictive()

    def alone(self, prediction: GaussianOutput, targets: Tensor) -> Any:
        """Facts of a mixture of one."""
        return mixture_points(prediction.mean.unsqueeze(0), prediction.variance.unsqueeze(0), targets)

    def finite(self, prediction: GaussianOutput) -> Tensor:
        """Whether mean and variance are finite."""
        return prediction.mean.isfinite() & prediction.variance.isfinite()
