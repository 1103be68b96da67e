"""How many training examples there are: the N of the posterior, counted as what is seen."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

__all__ = ["Counted", "count_examples", "counted_examples", "forget_dataloader_when_resuming", "training_examples"]

_REMEDY = "Pass the number of training examples: LowPrecisionSGLD(num_data=...)."


@dataclass(frozen=True)
class Counted:
    """N, and how it was found.

    Attributes:
        count: N >= 1, the examples that training sees.
        note: What the card says of it, where it is not the length of the data set.
        ordered: Whether every epoch goes through the data in the same order, so that a cut epoch sees the same part.
        ranks: Processes that share the data.
        weighted: Whether examples are drawn with weights: another likelihood.
    """

    count: int
    note: str = ""
    ordered: bool = False
    ranks: int = 1
    weighted: bool = False


def count_examples(loader: Any) -> int:
    """Number of distinct training examples behind one dataloader; see :func:`counted_examples`.

    Raises:
        ValueError: If the number cannot be known: an iterable data set without a length, or no ``dataset`` at all.
    """
    return counted_examples(loader).count


def counted_examples(loader: Any, max_batches: float | None = None) -> Counted:
    """Count the examples that an epoch over a dataloader sees, or that epochs may see where they are shuffled.

    Samplers of torch are known. Of another one ``len(sampler)`` examples are seen per epoch; without a length the data
    set is counted, and the note says so.

    Args:
        loader: What ``train_dataloader()`` returned, or one leaf of it.
        max_batches: Batches of an epoch, per process, where it is cut (``limit_train_batches``, ``overfit_batches``).

    Returns:
        What was counted.

    Raises:
        ValueError: As :func:`count_examples`.
    """
    size = _length_of_data(loader)
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    if getattr(loader, "batch_size", None) is None and batches is not None:  # the user's own batch sampler
        found = _of_batches(batches, size)
    elif size is None and not isinstance(sampler, SubsetRandomSampler):
        raise ValueError(f"num_data='auto': {type(loader).__name__} has no `dataset` to count. {_REMEDY}")
    else:
        found = _of_sampler(sampler, size)
    batch_size = getattr(batches, "batch_size", None) or getattr(loader, "batch_size", None)
    if not found.ordered or not batch_size or max_batches is None or not max_batches < float("inf"):
        return found
    seen = int(max_batches) * batch_size * found.ranks
    if seen >= found.count:
        return found
    return Counted(
        max(seen, 1), f"the first {seen} of {found.count} examples, which every epoch sees", True, found.ranks
    )


def _length_of_data(loader: Any) -> int | None:
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return None
    if not isinstance(dataset, Sized) or (isinstance(dataset, IterableDataset) and not hasattr(dataset, "__len__")):
        raise ValueError(f"num_data='auto': the data set {type(dataset).__name__} has no length. {_REMEDY}")
    if len(dataset) < 1:
        raise ValueError(f"num_data='auto': the training data set {type(dataset).__name__} is empty.")
    return len(dataset)


def _of_batches(batches: Any, size: int | None) -> Counted:
    """Of a batch sampler that the user made: its sampler's, or the indices of a list of batches."""
    if getattr(batches, "sampler", None) is not None:
        return _of_sampler(batches.sampler, size)
    if isinstance(batches, (list, tuple)):
        seen = len({int(i) for batch in batches for i in batch})
        return Counted(seen, "" if seen == size else f"{seen} different indices of the batch sampler", True)
    return _by_length(batches, size, getattr(batches, "batch_size", None))


def _of_sampler(sampler: Any, size: int | None) -> Counted:
    inner = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if isinstance(sampler, DistributedSampler) and inner is not None:  # Lightning's wrapper of a user's sampler
        found = _of_sampler(inner, size)
        return Counted(found.count, found.note, found.ordered, sampler.num_replicas, found.weighted)
    if isinstance(sampler, SubsetRandomSampler):
        seen = len({int(i) for i in sampler.indices})
        return Counted(seen, "" if seen == size else f"the subset that {type(sampler).__name__} draws from")
    if isinstance(sampler, WeightedRandomSampler):
        possible = int((sampler.weights > 0).sum())
        return Counted(possible, "examples of weight > 0", weighted=True)
    assert size is not None
    if isinstance(sampler, DistributedSampler):
        return Counted(size, ordered=not sampler.shuffle, ranks=sampler.num_replicas)
    if sampler is None or type(sampler) in (RandomSampler, SequentialSampler):
        return Counted(size, ordered=type(sampler) is SequentialSampler)
    return _by_length(sampler, size, 1)


def _by_length(sampler: Any, size: int | None, factor: int | None) -> Counted:
    """Of a sampler that is not known: its length times the examples of an item, on all processes."""
    name = type(sampler).__name__
    try:
        visits = len(sampler) * int(factor or 0) * int(getattr(sampler, "num_replicas", 1))
    except (TypeError, NotImplementedError):
        visits = 0
    if visits < 1:
        if size is None:
            raise ValueError(f"num_data='auto': {name} has no length, and there is no data set to count. {_REMEDY}")
        return Counted(size, f"the data set's length: {name} does not say how many examples it visits")
    seen = visits if size is None else min(visits, size)
    return Counted(seen, "" if seen == size else f"the examples that {name} visits in an epoch")


def training_examples(trainer: pl.Trainer) -> Counted:
    """Training examples that a trainer that is about to fit will see; sets up the train dataloader.

    Raises:
        ValueError: If there is more than one train dataloader, or the number cannot be known.
    """
    trainer.fit_loop.setup_data()
    combined = trainer.fit_loop._combined_loader
    leaves = combined.flattened if isinstance(combined, CombinedLoader) else [trainer.train_dataloader]
    if len(leaves) != 1:
        raise ValueError(f"num_data='auto': there are {len(leaves)} train dataloaders, which is ambiguous. {_REMEDY}")
    return counted_examples(leaves[0], trainer.num_training_batches)


def forget_dataloader_when_resuming(trainer: pl.Trainer) -> None:
    """Undo the early setup of the train dataloader, so that the checkpoint's loader state still reaches it.

    Lightning restores the state of a resumable dataloader when it sets the loader up, which must then come after the
    checkpoint is read; counting examples (or ``estimated_stepping_batches``) sets it up before. Without a checkpoint
    there is nothing to restore and the loader is kept.
    """
    loop = trainer.fit_loop
    if trainer.ckpt_path is None or loop._combined_loader is None:
        return
    if loop._data_fetcher is not None:
        loop._data_fetcher.teardown()
        loop._data_fetcher = None
    loop._combined_loader = None
