"""Passes over a trainer's dataloaders outside its own loop: batches, logits and targets as Lightning would see them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_lpsgld.distributed.shares import unpadded
from lightning_lpsgld.predictive import GaussianOutput, TaskReader, default_logits, default_targets

__all__ = [
    "EvaluationBatches",
    "Item",
    "LogitsRule",
    "TrainingBatches",
    "logits_of",
    "stage_loaders",
    "targets_of",
    "untouched_random_state",
]

#: ``"forward"``: ``module(inputs)`` of ``(inputs, targets)``; ``"predict_step"``; or ``function(module, batch)``
#: that returns ``(logits, targets)``.
LogitsRule = Literal["forward", "predict_step"] | Callable[[Any, Any], tuple[Tensor, Tensor]]


@dataclass
class Item:
    """A batch on its way: what it takes to get its logits, and its targets once they are known.

    Attributes:
        batch: As Lightning's loop would hand it to a step.
        index: Number of the batch.
        trainer: Its trainer.
        rule: How logits are made.
        room: Points of this batch, from its first, that are not padding; ``None``: all.
        reader: Knows in what form predictions come.
        targets: Set by :func:`logits_of`.
        size: Points in the batch, padding included; set by :func:`logits_of`.
    """

    batch: Any
    index: int
    trainer: pl.Trainer
    rule: LogitsRule
    room: int | None = None
    reader: TaskReader = field(default_factory=TaskReader)
    targets: Tensor | None = None
    size: int = 0


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Put the states of all global generators back afterwards, also when the block raises (`isolate_rng` does not)."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


def _step_context(trainer: pl.Trainer, rule: LogitsRule) -> contextlib.AbstractContextManager[Any]:
    plugin = trainer.precision_plugin
    if rule == "predict_step":
        return plugin.predict_step_context()
    return plugin.test_step_context() if trainer.testing else plugin.val_step_context()


def _forward(module: Any, item: Item) -> tuple[Any, Any]:
    if item.rule == "forward":
        return default_logits(module, item.batch), default_targets(item.batch)
    if item.rule == "predict_step":
        return module.predict_step(item.batch, item.index), default_targets(item.batch)
    assert callable(item.rule)
    result = item.rule(module, item.batch)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"EnsembleEvaluation: `logits` must return (logits, targets), got {type(result).__name__}.")
    return result


def logits_of(module: Any, item: Item) -> Tensor | GaussianOutput:
    """Predictions of the points of a batch that are not padding, first dim n; also sets the item's targets.

    Raises:
        TypeError: If predictions or targets are not tensors of the right kind.
        ValueError: If their first dims do not fit.
    """
    with _step_context(item.trainer, item.rule):
        output, targets = _forward(module, item)
    output = _checked(output, item.reader.open(output), targets, item.rule)
    first = output.mean if isinstance(output, GaussianOutput) else output
    item.size = len(first)
    keep = item.size if item.room is None else min(item.size, max(item.room, 0))
    item.targets = targets[:keep]
    if isinstance(output, GaussianOutput):
        return GaussianOutput(output.mean[:keep], output.variance.expand_as(output.mean)[:keep])
    return output[:keep]


def targets_of(item: Item) -> Tensor | None:
    """Targets of the points whose logits :func:`logits_of` returned."""
    return item.targets


def _checked(raw: Any, output: Any, targets: Any, rule: LogitsRule) -> Tensor | GaussianOutput:
    source = f"{rule!r}" if isinstance(rule, str) else "the function"
    remedy = "Pass EnsembleEvaluation(logits=function), with function(module, batch) -> (logits, targets)."
    first = output.mean if isinstance(output, GaussianOutput) else output
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim < 1:
        what = str(first.dtype) if isinstance(first, Tensor) else type(raw).__name__
        raise TypeError(f"EnsembleEvaluation: logits must be a floating tensor, but {source} gave {what}. {remedy}")
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"EnsembleEvaluation: targets must be a tensor, for classes of integer class indices, got "
            f"{type(targets).__name__}. {remedy}"
        )
    if targets.ndim < 1 or len(targets) != len(first):
        raise ValueError(
            f"EnsembleEvaluation: targets must have shape ({len(first)},) or ({len(first)}, ...) like the predictions' "
            f"first dim, got {tuple(targets.shape)}. {remedy}"
        )
    return output  # type: ignore[no-any-return]


def stage_loaders(trainer: pl.Trainer) -> list[tuple[Any, float]]:
    """The dataloaders of the stage that runs, with this trainer's limits on their number of batches."""
    loaders = tree_leaves(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)
    limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    return list(zip(loaders, limits))


def _on_device(trainer: pl.Trainer, batch: Any, loader_index: int) -> Any:
    """What Lightning's loops do to a batch before they call a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader_index)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader_index)


def _local_points(loader: Any) -> int | None:
    """Points of this rank's share that are not padding; ``None`` where nothing pads."""
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    samplers = [s for s in (inner, getattr(loader, "sampler", None)) if isinstance(s, DistributedSampler)]
    return unpadded(samplers[0]) if samplers else None


class EvaluationBatches:
    """Batches of a stage's dataloader, the same ones every time it is iterated, without repeats on any rank.

    The state of torch's global generator is put back before every pass, so that a shuffling loader gives the same
    order again. Each item's logits must be asked for before the next item.

    Args:
        trainer: The trainer.
        loader: One of :func:`stage_loaders`.
        limit: Most batches taken.
        loader_index: Number of the dataloader.
        rule: How logits are made.
        reader: Knows in what form predictions come.
        generator_state: Of torch's global generator at the start of a pass; the present one by default.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        loader: Any,
        limit: float,
        loader_index: int,
        rule: LogitsRule,
        reader: TaskReader | None = None,
        generator_state: Tensor | None = None,
    ) -> None:
        self.trainer, self.loader, self.limit = trainer, loader, limit
        self.loader_index, self.rule = loader_index, rule
        self.reader = TaskReader() if reader is None else reader
        self._generator_state = torch.get_rng_state() if generator_state is None else generator_state

    def __iter__(self) -> Iterator[Item]:
        torch.set_rng_state(self._generator_state)
        room = _local_points(self.loader)
        for index, batch in enumerate(self.loader):
            if index >= self.limit:
                break
            batch = _on_device(self.trainer, batch, self.loader_index)
            item = Item(batch, index, self.trainer, self.rule, room, self.reader)
            yield item
            room = None if room is None else room - item.size


class TrainingBatches:
    """The first batches of the training data, to measure BatchNorm statistics on; averaged over ranks when exhausted.

    Args:
        trainer: The trainer; outside of a fit its module or datamodule provides ``train_dataloader``.
        limit: Number of batches.
        rule: How logits are made.
        reader: Knows in what form predictions come.
        remembered: The loader of an earlier fit, taken where there is no other.
        generator_state: Of torch's global generator at the start of a pass; the present one by default.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        limit: int,
        rule: LogitsRule,
        reader: TaskReader | None = None,
        remembered: Any = None,
        generator_state: Tensor | None = None,
    ) -> None:
        self.trainer, self.limit, self.rule = trainer, limit, rule
        self.reader = TaskReader() if reader is None else reader
        self.loader = _own_loader(_training_loader(trainer, remembered))
        self._generator_state = torch.get_rng_state() if generator_state is None else generator_state

    def __iter__(self) -> Iterator[Item]:
        torch.set_rng_state(self._generator_state)
        for index, batch in enumerate(self.loader):
            if index >= self.limit:
                break
            yield Item(_on_device(self.trainer, batch, 0), index, self.trainer, self.rule, None, self.reader)
        # every rank has passed its share through; what each layer averaged is averaged once more
        for layer in self.trainer.lightning_module.modules():
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
                for statistic in (layer.running_mean, layer.running_var):
                    statistic.copy_(self.trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))


def _training_loader(trainer: pl.Trainer, remembered: Any) -> Any:
    loader = trainer.train_dataloader
    if loader is None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        source = trainer.lightning_module if datamodule is None else datamodule
        try:
            loader = source.train_dataloader()
        except Exception as error:  # a datamodule that is set up for testing only fails in its own way
            if remembered is None:
                raise RuntimeError(
                    f"EnsembleEvaluation(refresh_batch_norm=...) needs training batches, but {type(source).__name__}."
                    "train_dataloader() gave none. Pass `datamodule=` (with `datamodule.setup('fit')` called first), "
                    "define `train_dataloader` in the module, or test with the callback that was there when `fit` got "
                    "its loaders: it remembers them."
                ) from error
            loader = remembered
    leaves = tree_leaves(loader)
    if len(leaves) != 1:
        raise RuntimeError(
            f"EnsembleEvaluation(refresh_batch_norm=...) takes one train dataloader, and there are {len(leaves)}. "
            "Refresh with `lightning_lpsgld.predictive.refresh_batch_norm` instead."
        )
    return leaves[0]


def _own_loader(loader: Any) -> Iterable[Any]:
    """A loader of the same batches, so that the iterator of an epoch that is under way is left alone."""
    if type(loader) is not DataLoader or loader.batch_sampler is None:
        return loader  # type: ignore[no-any-return]
    return DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)
