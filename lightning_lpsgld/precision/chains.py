"""Which of several parallel chains this process belongs to, and what follows for its sampler."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_lpsgld.random import derive_seed
from lightning_lpsgld.samplers import LangevinOptimizer

__all__ = ["chain_of", "refuse_mixed_chains", "seed_of_chain", "separate_chain"]


def chain_of(trainer: pl.Trainer) -> int | None:
    """Number of this rank's chain under a strategy that runs several; ``None`` under any other."""
    chain: int | None = getattr(trainer.strategy, "chain", None)
    return chain


def seed_of_chain(trainer: pl.Trainer, seed: int) -> int:
    """Seed of this rank's chain; ``seed`` itself where there is one chain."""
    chain = chain_of(trainer)
    return seed if chain is None else derive_seed(seed, "chain", chain)


def separate_chain(trainer: pl.Trainer, sampler: LangevinOptimizer) -> None:
    """Give a sampler that the user made, the same on every rank, the seed of its chain."""
    for group in sampler.param_groups:
        group["seed"] = seed_of_chain(trainer, group["seed"])


def refuse_mixed_chains(trainer: pl.Trainer, sampler: LangevinOptimizer) -> None:
    """Refuse a sampler that communicates over all ranks.

    Raises:
        RuntimeError: Under a strategy that runs several chains.
    """
    if chain_of(trainer) is not None:
        raise RuntimeError(
            f"{type(sampler).__name__} averages its full gradient over all ranks, and would mix the chains of "
            f"{type(trainer.strategy).__name__}. Use DDPStrategy, or SGLD."
        )
