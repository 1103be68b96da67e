"""Which samples a bank of limited capacity keeps: pure functions of how many have arrived."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.random import DrawKey, Role, stream_id, words

__all__ = ["Policy", "check_retention", "kept_arrivals"]

#: ``"last"``: the newest; ``"thin"``: evenly spaced over the whole chain; ``"reservoir"``: a uniform random subset.
Policy = Literal["thin", "reservoir", "last"]


def check_retention(capacity: object, policy: object, seed: object) -> None:
    """Raise :class:`BankError` unless the three make sense."""
    if capacity is not None and (type(capacity) is not int or not 1 <= capacity < 2**31):
        raise BankError(f"`capacity` must be None or an int >= 1, got {capacity!r:.80}.")
    if policy not in get_args(Policy):
        raise BankError(f"`policy` must be one of {get_args(Policy)}, got {policy!r:.80}.")
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise BankError(f"`seed` must be an int in [0, 2**64), got {seed!r:.80}.")


@lru_cache(maxsize=8)
def _draws(seed: int, chain: int, block: int) -> tuple[int, ...]:
    """Words of arrivals ``1024 * block`` to ``1024 * block + 1023`` of a chain."""
    key = DrawKey(seed, step=chain % 2**32, stream=stream_id(Role.SAMPLE, 0), offset=1024 * block)
    return tuple(words((1024,), key).tolist())


@lru_cache(maxsize=64)
def _reservoir(first: int, arrivals: int, capacity: int, seed: int, chain: int) -> tuple[int, ...]:
    slots = list(_reservoir(0, first, capacity, seed, chain)) if first else []
    for n in range(first, arrivals):
        if n < capacity:
            slots.append(n)
            continue
        slot = (_draws(seed, chain, n // 1024)[n % 1024] * (n + 1)) >> 32
        if slot < capacity:
            slots[slot] = n
    return tuple(slots)


def kept_arrivals(arrivals: int, capacity: int | None, policy: Policy, *, seed: int = 0, chain: int = 0) -> set[int]:
    """Numbers (0, 1, ...) of the arrivals that a chain keeps after ``arrivals`` of them.

    The answer depends on nothing else, so a run that was cut back to a checkpoint and repeated keeps what an
    uninterrupted run keeps.

    Args:
        arrivals: Samples offered so far.
        capacity: Most samples to keep; ``None``: all.
        policy: ``"last"`` keeps the newest. ``"thin"`` keeps every 2^j-th with the smallest j that fits.
            ``"reservoir"`` keeps a uniform random subset (algorithm R on the bank's own counter-based draws).
        seed: Seed of the reservoir.
        chain: Label of the chain, so that chains draw differently.

    Returns:
        At most ``capacity`` numbers.

    Example:
        >>> sorted(kept_arrivals(9, 4, "thin"))
        [0, 4, 8]
        >>> sorted(kept_arrivals(9, 4, "last"))
        [5, 6, 7, 8]

    Reference:
        Vitter, 1985, "Random sampling with a reservoir", algorithm R.
    """
    if capacity is None or arrivals <= capacity:
        return set(range(arrivals))
    if policy == "last":
        return set(range(arrivals - capacity, arrivals))
    if policy == "thin":
        stride = 1
        while -(-arrivals // stride) > capacity:
            stride *= 2
        return set(range(0, arrivals, stride))
    return set(_reservoir(arrivals // 64 * 64, arrivals, capacity, seed, chain))
