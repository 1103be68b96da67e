"""How many training examples there are: the N of the posterior."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import IterableDataset, SubsetRandomSampler

__all__ = ["count_examples", "forget_dataloader_when_resuming", "training_examples"]

_REMEDY = "Pass the number of training examples: LowPrecisionSGLD(num_data=...)."


def count_examples(loader: Any) -> int:
    """Number of distinct training examples behind one dataloader.

    A ``SubsetRandomSampler`` restricts the data set to its indices; every other sampler only orders it.

    Args:
        loader: What ``train_dataloader()`` returned, or one leaf of it.

    Returns:
        N >= 1.

    Raises:
        ValueError: If the number cannot be known: an iterable data set without a length, or no ``dataset`` at all.
    """
    dataset = getattr(loader, "dataset", None)
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return len(sampler)
    if dataset is None:
        raise ValueError(f"num_data='auto': {type(loader).__name__} has no `dataset` to count. {_REMEDY}")
    if not isinstance(dataset, Sized) or (isinstance(dataset, IterableDataset) and not hasattr(dataset, "__len__")):
        raise ValueError(f"num_data='auto': the data set {type(dataset).__name__} has no length. {_REMEDY}")
    count = len(dataset)
    if count < 1:
        raise ValueError(f"num_data='auto': the training data set {type(dataset).__name__} is empty.")
    return count


def training_examples(trainer: pl.Trainer) -> int:
    """Number of training examples of a trainer that is about to fit; sets up the train dataloader.

    Raises:
        ValueError: If there is more than one train dataloader, or the number cannot be known.
    """
    trainer.fit_loop.setup_data()
    combined = trainer.fit_loop._combined_loader
    leaves = combined.flattened if isinstance(combined, CombinedLoader) else [trainer.train_dataloader]
    if len(leaves) != 1:
        raise ValueError(f"num_data='auto': there are {len(leaves)} train dataloaders, which is ambiguous. {_REMEDY}")
    return count_examples(leaves[0])


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
