"""Who is who among the ranks: which chain a rank belongs to, and who shares it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lightning_lpsgld.random import derive_seed

__all__ = ["RunsChains", "Topology", "topology_of"]


@runtime_checkable
class RunsChains(Protocol):
    """A strategy that runs several chains side by side; what the rest of the package asks of one.

    Attributes:
        replica_group: Process group of this rank's chain; ``None`` before processes have started.
    """

    replica_group: Any

    @property
    def chains(self) -> int:
        """Number of chains."""

    @property
    def replicas(self) -> int:
        """Ranks per chain."""

    @property
    def chain(self) -> int:
        """Number of this rank's chain."""

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of its chain."""

    def gather_objects(self, value: Any, *, to_all: bool) -> list[Any]:
        """Values of all ranks, in their order; a collective call."""


@dataclass(frozen=True)
class Topology:
    """Place of this rank.

    Attributes:
        chain: Number of its chain; ``None`` where all ranks are of one.
        chains: Number of chains.
        replicas: Ranks per chain.
        group: Process group of the chain; ``None``: all ranks.

    Example:
        >>> Topology(replicas=2).seed_of(7)
        7
        >>> Topology(chain=1, chains=2).seed_of(7) == Topology(chain=0, chains=2).seed_of(7)
        False
    """

    chain: int | None = None
    chains: int = 1
    replicas: int = 1
    group: Any = None

    def seed_of(self, seed: int) -> int:
        """Seed of this rank's chain; ``seed`` itself where there is one chain."""
        return seed if self.chain is None else derive_seed(seed, "chain", self.chain)


def topology_of(strategy: object, world_size: int) -> Topology:
    """Place of this rank under a strategy of the Trainer, whose ranks are of one chain unless it says otherwise.

    Args:
        strategy: The Trainer's.
        world_size: Number of ranks.

    Returns:
        Chain and place in it.
    """
    if isinstance(strategy, RunsChains):
        return Topology(strategy.chain, strategy.chains, strategy.replicas, strategy.replica_group)
    return Topology(replicas=world_size)
