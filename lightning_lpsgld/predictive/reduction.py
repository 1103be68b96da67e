"""From the outputs of the members to one prediction: sums of probabilities and entropies, or moments of means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.predictive.outputs import GaussianOutput, read_output
from lightning_lpsgld.predictive.prediction import ClassPrediction, Prediction, RegressionPrediction
from lightning_lpsgld.predictive.reading import decide_task
from lightning_lpsgld.predictive.tasks import Binary, Multiclass, Multilabel, Regression, Task

__all__ = ["open_output", "reduce_outputs", "task_of"]


def open_output(output: Any, task: Task | None) -> Tensor | GaussianOutput:
    """Logits, a mean, or a mean with its variance, from whatever a member gave; a bare pair is (mean, variance).

    Raises:
        TypeError: If there is nothing of the kind in it.
    """
    pair = type(output) in (tuple, list) and len(output) == 2
    form = "auto" if task is None else task.outputs
    opened = read_output(output, "mean_variance" if pair and form in ("auto", "mean") else form)
    first = opened.mean if isinstance(opened, GaussianOutput) else opened
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise TypeError(
            f"PosteriorEnsemble: the module gave {type(output).__name__}; it takes logits, means, or a pair (mean, "
            "variance). Pass forward=function(module, batch) that returns one of them."
        )
    return opened


def task_of(opened: Tensor | GaussianOutput, task: Task | None) -> Task:
    """The task; where none was said, as far as the form of an output tells.

    Raises:
        ValueError: If it does not tell.
    """
    return decide_task(opened, None) if task is None else task


def _classes(outputs: Iterable[Any], task: Multiclass | Binary | Multilabel) -> ClassPrediction:
    total, entropies, count = torch.zeros(()), torch.zeros(()), 0
    for output in outputs:
        p = task.probabilities(output).double()
        terms = torch.special.entr(p).sum(1)
        total, entropies = (p, terms) if count == 0 else (total + p, entropies + terms)
        count += 1
    mean, expected = total / count, entropies / count
    predictive = torch.special.entr(mean).sum(1)
    mean = mean[:, 1] if isinstance(task, Multilabel) else mean
    return ClassPrediction(mean, predictive, expected, (predictive - expected).clamp(min=0.0))


def _moments(outputs: Iterable[Any], noise_variance: float) -> RegressionPrediction:
    """Welford's recurrence: no cancellation where the members agree."""
    mean, spread, aleatoric, count = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0
    for output in outputs:
        given = isinstance(output, GaussianOutput)
        value = (output.mean if given else output).double()
        noise = output.variance.double().expand_as(value) if given else torch.full_like(value, noise_variance)
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


def reduce_outputs(outputs: Iterable[Any], task: Task, noise_variance: float | None) -> Prediction:
    """One prediction, in float64, from what the members gave.

    Args:
        outputs: Of each member, at least one, as :func:`open_output` gives them.
        task: Their task.
        noise_variance: Aleatoric variance of members that give values only, where the task does not say it; ``None``:
            nobody has, and it is 0.

    Raises:
        TypeError: If an output is no tensor that the task can read.
        ValueError: If a shape does not fit the task, a variance is negative, or one is given for another task.
    """
    if isinstance(task, Regression):
        return _moments(outputs, (noise_variance or 0.0) if task.noise_variance is None else task.noise_variance)
    if noise_variance is not None:
        kind = type(task).__name__.lower()
        raise ValueError(
            f"PosteriorEnsemble: `noise_std` is of a regression, and these outputs are {kind}; leave it out."
        )
    assert isinstance(task, (Multiclass, Binary, Multilabel)), task
    return _classes(outputs, task)
