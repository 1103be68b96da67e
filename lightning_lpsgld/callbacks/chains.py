"""Samples of parallel chains on their way into one bank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.distributed import RunsChains
from lightning_lpsgld.samplers import LangevinOptimizer

__all__ = ["add_sample", "begin_new_chain", "chain_count", "settle_samplers"]


def chain_count(trainer: pl.Trainer) -> int:
    """Number of chains that run side by side."""
    strategy = trainer.strategy
    return strategy.chains if isinstance(strategy, RunsChains) else 1


def begin_new_chain(bank: SampleBank | None, trainer: pl.Trainer, label: int, run: str | None) -> int:
    """A chain begins anew at a checkpoint's weights: its samples are not those of the old one, and get the next label.

    Args:
        bank: The bank, on ranks that write; rank zero's counts.
        trainer: The trainer; a collective call.
        label: Label of the old chain.
        run: Id of the run that both chains are of.

    Returns:
        Label of the new chain; of parallel ones, of the first.
    """
    taken = {label}
    if bank is not None:
        taken |= {*bank.chains, *bank.runs, *(damage.info.chain for damage in bank.damaged)}
    new = int(trainer.strategy.broadcast(max(taken) + 1))
    if bank is not None and run is not None:
        bank.claim(run, range(new, new + chain_count(trainer)))
    return new


def settle_samplers(trainer: pl.Trainer) -> None:
    """On an accelerator a NaN is known late, and must not become a sample.

    Raises:
        FloatingPointError: As :meth:`LangevinOptimizer.settle`.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LangevinOptimizer):
            optimizer.settle()


def add_sample(
    bank: SampleBank | None,
    trainer: pl.Trainer,
    tensors: Mapping[str, Tensor],
    *,
    chain: int,
    to_all: bool,
    **info: Any,
) -> None:
    """Add a sample of every chain to the bank; a collective call where there is more than one.

    What is sent is codes and exponents.

    Args:
        bank: Where to, on ranks that write; ``None`` on the others.
        trainer: Its strategy says who belongs to which chain.
        tensors: This rank's weights and buffers.
        chain: Label of chain 0; the others follow.
        to_all: Whether all ranks write.
        info: Further arguments of :meth:`SampleBank.add`.

    Raises:
        BankError: If the sample of one of the chains is refused; on the ranks that write.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, RunsChains) or strategy.chains == 1:
        if bank is not None:
            bank.add(tensors, chain=chain, **info)
        return
    mine: dict[str, Any] | BankError | None = None
    if strategy.leads:
        alone = SampleBank()
        try:
            alone.add(tensors, chain=chain + strategy.chain, **info)
            mine = alone.state_dict()
        except BankError as error:
            mine = BankError(f"Chain {chain + strategy.chain}: {error}")  # all ranks must reach the exchange
    gathered = [part for part in strategy.gather_objects(mine, to_all=to_all) if part is not None]
    for part in gathered:
        if isinstance(part, BankError):
            raise part
    for part in gathered:
        if bank is not None:
            other = SampleBank()
            other.load_state_dict(part)
            bank.merge(other)
