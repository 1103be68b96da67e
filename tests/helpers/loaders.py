"""Data whose order is a function of (epoch, position), as a run needs that must resume bitwise in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

__all__ = ["ResumableLoader"]


class ResumableLoader:
    """Shuffled batches whose position is in a ``state_dict``, as ``torchdata.StatefulDataLoader`` has it.

    Lightning neither saves the global generator nor skips the batches that a plain ``DataLoader`` already gave.

    Args:
        dataset: What to draw batches from.
        batch_size: Per rank; what is left over after whole batches of all ranks is dropped.
        rank: Number of the rank, which takes every ``world``-th batch.
        world: Number of ranks.
    """

    def __init__(self, dataset: TensorDataset, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.dataset, self.batch_size, self.rank, self.world = dataset, batch_size, rank, world
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return len(self.dataset) // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[Tensor]]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.epoch))
        while self.position < len(self):
            first = (self.position * self.world + self.rank) * self.batch_size
            self.position += 1
            rows = order[first : first + self.batch_size]
            yield [tensor[rows] for tensor in self.dataset.tensors]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
