"""Reading predictions of a task that may have to be found out first."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lpsgld.predictive.outputs import GaussianOutput, read_output
from lightning_lpsgld.predictive.tasks import (
    IGNORED,
    Binary,
    Multiclass,
    Multilabel,
    Regression,
    Task,
    class_dim_of,
    logits_in,
    same_points,
)

__all__ = ["TaskName", "TaskReader", "decide_task", "named_task"]

#: What a module's outputs are for; ``"auto"`` finds out from outputs and targets.
TaskName = Literal["auto", "multiclass", "binary", "multilabel", "regression"]

_TASKS = {"multiclass": Multiclass, "binary": Binary, "multilabel": Multilabel, "regression": Regression}


def named_task(task: TaskName | Task, ignore_index: int | None = None) -> Task | None:
    """A task by its name, or the task itself; ``None`` for ``"auto"``.

    Raises:
        ValueError: If the name is unknown, or ``ignore_index`` is given beside a task that has its own.

    Example:
        >>> named_task("binary").name
        'binary'
    """
    if isinstance(task, str):
        if task not in ("auto", *_TASKS):
            raise ValueError(f"`task` must be 'auto', {', '.join(map(repr, _TASKS))} or a task, got {task!r}.")
        return None if task == "auto" else _TASKS[task](ignore_index=ignore_index)
    if not isinstance(task, tuple(_TASKS.values())):
        raise ValueError(f"`task` must be a name or a task such as Regression(), got {task!r}.")
    if ignore_index is not None:
        raise ValueError(f"Give `ignore_index` to {type(task).__name__}(...), not beside it.")
    return task


def decide_task(output: Any, targets: Tensor | None, ignore_index: int | None = None) -> Task:
    """The task that logits or means and targets of one batch look like.

    Integer targets: ``multiclass`` where the logits have one dim more (classes second or last), ``binary`` or
    ``multilabel`` where shapes agree. Floating targets of the predictions' shape: ``multiclass`` if they are
    distributions over dim 1, ``binary`` or ``multilabel`` if they are all 0 or 1, else ``regression``. Predictions with
    a variance: ``regression``.

    Args:
        output: What :func:`~lightning_lpsgld.predictive.read_output` returned.
        targets: Targets of the batch, or ``None``.
        ignore_index: Target that marks what does not count.

    Returns:
        The task.

    Raises:
        TypeError: If logits of classes come with targets that are no class indices.
        ValueError: If shapes fit no task.

    Example:
        >>> import torch
        >>> decide_task(torch.zeros(4, 1), torch.tensor([0.3, 1.2, -4.0, 2.2])).name
        'regression'
        >>> decide_task(torch.zeros(2, 7, 10), torch.zeros(2, 7, dtype=torch.long)).class_dim
        -1
    """
    if isinstance(output, GaussianOutput):
        return Regression(ignore_index=ignore_index)
    logits = logits_in(output, "auto")
    if targets is None and logits.ndim >= 2 and logits.shape[1] >= 2:
        return Multiclass(ignore_index, 1)
    if targets is not None and (dim := class_dim_of(logits, targets)) is not None:
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise TypeError(
                f"Logits of shape {tuple(logits.shape)} need integer class indices, got {targets.dtype} of shape "
                f"{tuple(targets.shape)}. For numbers give predictions of the targets' shape."
            )
        return Multiclass(ignore_index, dim)
    if targets is not None and same_points(logits, targets):
        return _elementwise(logits, targets, ignore_index)
    if targets is None:
        raise ValueError(
            f"An output of shape {tuple(logits.shape)} may be a logit or a value; say task='binary', 'multilabel' or "
            "'regression'."
        )
    raise ValueError(
        f"Predictions of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)} fit no task: classes "
        "have logits of shape (batch, classes), (batch, classes, ...) or (batch, ..., classes) and targets (batch, "
        "...); numbers, one logit or several labels have predictions and targets of one shape. Pass `task`, or a "
        "function as `logits`."
    )


def _elementwise(logits: Tensor, targets: Tensor, ignore_index: int | None) -> Task:
    """The task of predictions and targets of one shape."""
    several = logits.ndim >= 2 and logits.shape[1] > 1
    counted = targets[targets != (IGNORED if ignore_index is None else ignore_index)]
    zero_one = bool(((counted == 0) | (counted == 1)).all())
    if targets.is_floating_point() and several and bool((targets >= 0).all()):
        totals = targets.double().sum(1)
        if torch.allclose(totals, torch.ones_like(totals), atol=1e-3):
            return Multiclass(ignore_index, 1)
    if zero_one:
        return Multilabel(ignore_index) if several else Binary(ignore_index)
    if targets.is_floating_point():
        return Regression(ignore_index=ignore_index)
    wrong = counted[(counted != 0) & (counted != 1)][0].item()
    raise ValueError(
        f"Integer targets of the shape of the predictions, {tuple(logits.shape)}, and one of them is {wrong}: for "
        "classes give logits of shape (batch, classes), for counts pass task='regression', for targets that do not "
        f"count ignore_index={wrong}."
    )


class TaskReader:
    """Reads predictions as a task asks; what ``"auto"`` finds in the first batch holds for all that follow.

    Args:
        task: Name or task.
        ignore_index: For tasks given by name: target of what does not count.
        say: Takes what should be known once: the noise that is assumed around bare means.

    Raises:
        ValueError: If the name is unknown, or ``ignore_index`` is given beside a task that has its own.

    Example:
        >>> import torch
        >>> reader = TaskReader("auto")
        >>> reader.read({"logits": torch.zeros(2, 3)}, torch.tensor([2, -100]))[1]
        tensor([2])
        >>> reader.task.name
        'multiclass'
    """

    def __init__(
        self, task: TaskName | Task = "auto", ignore_index: int | None = None, say: Callable[[str], Any] = warnings.warn
    ) -> None:
        self.ignore_index, self._say = ignore_index, say
        self.task = named_task(task, ignore_index)

    def open(self, output: Any) -> Any:
        """Logits, mean or :class:`GaussianOutput` from what a module gave."""
        return read_output(output, "auto" if self.task is None else self.task.outputs)

    def read(self, output: Any, targets: Tensor | None) -> tuple[Any, Tensor | None]:
        """Prediction and target of every point; decides the task if that is still open."""
        output = self.open(output)
        if self.task is None:
            self.task = decide_task(output, targets, self.ignore_index)
        if isinstance(self.task, Regression) and self.task.noise_variance is None and isinstance(output, Tensor):
            self._mention_noise()
        return self.task.read(output, targets)

    def _mention_noise(self) -> None:
        say, self._say = self._say, lambda message: None
        say(
            "Predictions are means without a variance: noise of variance 0.5 is assumed around them, which is what "
            "`mse_loss` as negative log likelihood means. Pass task=Regression(noise_variance=...) for another loss, "
            "or let the module give a variance."
        )
