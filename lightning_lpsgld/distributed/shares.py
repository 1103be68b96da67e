"""Which entries of a rank's share of the data are its own, and which even out the ranks."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DistributedSampler

__all__ = ["unpadded"]


def unpadded(sampler: DistributedSampler[Any]) -> int:
    """Entries of this rank, from the first on, that are no repeats.

    ``DistributedSampler`` repeats points until all ranks have equally many: entry j of rank r is number ``j * ranks +
    r`` of the padded list, and those from ``len(dataset)`` on are the padding.

    Example:
        >>> unpadded(DistributedSampler(range(5), num_replicas=2, rank=1))
        2
    """
    length: int = len(sampler.dataset)  # type: ignore[arg-type]
    return max(0, -(-(length - sampler.rank) // sampler.num_replicas))
