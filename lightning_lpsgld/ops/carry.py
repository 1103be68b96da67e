"""Draws that the top of a block has for itself: keys that share nothing with those of the op.

What they decide is said by the format (:meth:`~.NumberFormat.carried`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from lightning_lpsgld.formats.base import Coins
from lightning_lpsgld.random import DrawKey, derive_seed, words

__all__ = ["carry_key", "carry_seed", "coins_of", "hole_key"]


@lru_cache(256)
def carry_seed(seed: int) -> int:
    """Seed of the coins of every key with this seed."""
    return derive_seed(seed, "carry")


def carry_key(key: DrawKey) -> DrawKey:
    """Key of the coins thrown where a block takes the next exponent."""
    return replace(key, seed=carry_seed(key.seed))


def hole_key(key: DrawKey) -> DrawKey:
    """Key of the coins of :meth:`.MicroscalingFloat.settled`."""
    return replace(key, seed=derive_seed(key.seed, "hole"))


def coins_of(key: DrawKey, shape: torch.Size, device: torch.device) -> Coins:
    """The words that a format may ask for, by name, for one op with ``key`` on a tensor of ``shape``."""

    def coins(name: str) -> Tensor:
        seed = carry_seed(key.seed) if name == "carry" else derive_seed(key.seed, name)
        return words(shape, replace(key, seed=seed), device=device)

    return coins
