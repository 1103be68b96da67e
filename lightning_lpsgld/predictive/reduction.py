"""From the outputs of the members to one prediction: sums of probabilities and entropies, or moments of means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lpsgld.metrics.simplex import refuse_probabilities
from lightning_lpsgld.predictive.prediction import ClassPrediction, Prediction, RegressionPrediction

__all__ = ["TASKS", "Task", "reduce_outputs", "task_of"]

Task = Literal["auto", "multiclass", "binary", "multilabel", "regression"]
TASKS = ("auto", "multiclass", "binary", "multilabel", "regression")


def task_of(output: Any, task: Task) -> Task:
    """The task that an output belongs to; with ``"auto"``, as far as its form tells.

    Raises:
        ValueError: If ``"auto"`` cannot tell.
        TypeError: If the output is no floating tensor and no pair of them.
    """
    first = output[0] if isinstance(output, (tuple, list)) and len(output) == 2 else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise TypeError(
            f"PosteriorEnsemble: the module gave {type(output).__name__}; it takes logits, means, or a pair (mean, "
            "variance). Pass forward=function(module, batch) that returns one of them."
        )
    if task != "auto":
        return task
    if first is not output:
        return "regression"
    if first.ndim >= 2 and first.shape[1] >= 2:
        return "multiclass"
    raise ValueError(
        f"PosteriorEnsemble: an output of shape {tuple(first.shape)} may be a logit or a value; say task='binary', "
        "'multilabel' or 'regression'."
    )


def _probabilities(logits: Tensor, task: Task) -> Tensor:
    """Probabilities with classes in dim 1: ``(n, classes, ...)``; two classes per label of a binary or multilabel."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if task == "multiclass":
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise ValueError(
                f"PosteriorEnsemble: logits must have shape (n, classes, ...) with classes >= 2, got "
                f"{tuple(logits.shape)}. Say task='binary' for one logit a point."
            )
        refuse_probabilities(logits.movedim(1, -1).reshape(-1, logits.shape[1]))
        return logits.softmax(1).double()
    if task == "binary":
        logits = logits.flatten()
    return torch.stack([(-logits).sigmoid(), logits.sigmoid()], dim=1).double()


def _classes(outputs: Iterable[Tensor], task: Task) -> ClassPrediction:
    total, entropies, count = torch.zeros(()), torch.zeros(()), 0
    for output in outputs:
        p = _probabilities(output, task)
        terms = torch.special.entr(p).sum(1)
        total, entropies = (p, terms) if count == 0 else (total + p, entropies + terms)
        count += 1
    mean, expected = total / count, entropies / count
    predictive = torch.special.entr(mean).sum(1)
    mean = mean[:, 1] if task == "multilabel" else mean
    return ClassPrediction(mean, predictive, expected, (predictive - expected).clamp(min=0.0))


def _moments(outputs: Iterable[Any], noise_variance: float) -> RegressionPrediction:
    """Welford's recurrence: no cancellation where the members agree."""
    mean, spread, aleatoric, count = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0
    for output in outputs:
        pair = isinstance(output, (tuple, list))
        value = (output[0] if pair else output).double()
        noise = output[1].double() if pair else torch.full_like(value, noise_variance)
        if not bool((noise >= 0).all()):
            raise ValueError("PosteriorEnsemble: a predicted variance is negative or NaN; return (mean, variance).")
        count += 1
        if count == 1:
            mean, spread, aleatoric = value, torch.zeros_like(value), noise
            continue
        step = value - mean
        mean = mean + step / count
        spread = spread + step * (value - mean)
        aleatoric = aleatoric + noise
    return RegressionPrediction(mean, spread / count, aleatoric / count)


def reduce_outputs(outputs: Iterable[Any], task: Task, noise_variance: float) -> Prediction:
    """One prediction, in float64, from what the members gave.

    Args:
        outputs: Of each member, at least one: logits, values, or pairs (mean, variance).
        task: Not ``"auto"``.
        noise_variance: Aleatoric variance of members that give values only.

    Raises:
        ValueError: If a shape does not fit the task, or a variance is negative.
    """
    return _moments(outputs, noise_variance) if task == "regression" else _classes(outputs, task)
