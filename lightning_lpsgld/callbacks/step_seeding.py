"""Dropout that survives a crash: torch's generators as a function of (seed, batch, rank)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_lpsgld.random import derive_seed

__all__ = ["StepSeeding"]


class StepSeeding(Callback):
    """Seed torch's generators before every training batch, so that a resumed run draws what the first one would have.

    The draws of the samplers and quantizers need no generator. Dropout, ``torch.randn_like`` in a training step and the
    like read torch's global ones, which Lightning does not save: without this callback a run with dropout resumes to
    another, equally valid chain. Each rank has draws of its own. What worker processes of a dataloader draw
    (augmentation) is not covered; a loader with state must take care of that.

    Args:
        seed: Any int; the run's, by preference. The same on every rank, and when resuming.

    Example:
        >>> StepSeeding(seed=1).seed
        1
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators of the CPU and of all accelerators."""
        batches = trainer.fit_loop.total_batch_idx
        torch.manual_seed(derive_seed(self.seed, "batch", batches, trainer.global_rank) % 2**63)
