"""Ranks that have to agree before they go on: what one of them finds is what all of them say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from lightning_lpsgld.bank import BankError, SampleBank

__all__ = ["RanksDisagreeError", "opened_alike", "raise_everywhere"]


class RanksDisagreeError(BankError):
    """Ranks of one run see different banks."""


def _from_all(value: Any) -> list[Any]:
    """Values of all ranks, in their order; a collective call where there is more than one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_everywhere(problem: Exception | None) -> None:
    """Raise on every rank if there is a problem on one; a collective call.

    A rank that went on alone would wait for the others until the process group gives up.
    """
    messages = _from_all(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for rank, message in enumerate(messages):
        if message is not None:
            raise BankError(f"Rank {rank} cannot go on, so that none can. {message}")


def opened_alike(open_bank: Callable[[], SampleBank]) -> SampleBank:
    """The bank that a function opens, if it is the same one on every rank; a collective call.

    Args:
        open_bank: Gives the bank, or raises :class:`BankError`.

    Raises:
        RanksDisagreeError: On every rank, if ranks see different ones.
        BankError: What the function raises, if it does on every rank.
    """
    bank: SampleBank | None = None
    problem: BankError | None = None
    try:
        bank = open_bank()
    except BankError as error:
        problem = error
    everywhere = _from_all(None if bank is None else (bank.path, len(bank), bank.fingerprint))
    if len({None if seen is None else seen[1:] for seen in everywhere}) > 1:
        what = "; ".join(f"rank {rank} sees {_described(seen)}" for rank, seen in enumerate(everywhere))
        raise RanksDisagreeError(
            f"Ranks see different banks: {what}. Put the bank where every rank can read it, not into a directory of "
            "one node."
        )
    if bank is None:
        assert problem is not None
        raise problem
    return bank


def _described(seen: tuple[str | None, int, str | None] | None) -> str:
    if seen is None:
        return "none"
    path, count, fingerprint = seen
    of = "" if fingerprint is None else f" of module {fingerprint[:12]}"
    return f"{count} samples{of} {'in its memory' if path is None else f'at {path}'}"
