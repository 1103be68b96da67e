"""The seed of a run: given, of ``seed_everything``, or drawn; the same on every rank."""

from __future__ import annotations

import os
import secrets

import lightning.pytorch as pl

__all__ = ["run_seed"]


def run_seed(seed: int | None, trainer: pl.Trainer | None) -> int:
    """Seed of all draws of a run.

    Args:
        seed: The user's, or ``None``: then that of ``seed_everything``, else a drawn one.
        trainer: Its strategy broadcasts rank zero's; ``None`` outside of a trainer.

    Returns:
        An int, equal on all ranks. No global generator is read.
    """
    if seed is None and os.environ.get("PL_GLOBAL_SEED"):
        seed = int(os.environ["PL_GLOBAL_SEED"])
    if seed is None:
        seed = secrets.randbits(62)
    return int(seed if trainer is None else trainer.strategy.broadcast(seed))
