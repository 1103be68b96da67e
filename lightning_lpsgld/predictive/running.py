"""Bookkeeping of sums per test point: the same batches, in the same order, for every sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["ChangedBatchesError", "RunningPredictive"]


class ChangedBatchesError(ValueError):
    """A sample saw other batches than the first one."""


class RunningPredictive(ABC):
    """Predictions of a growing set of samples, batch by batch; a subclass says what is kept of a prediction."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._targets: list[Tensor | None] = []
        self._next = 0

    @abstractmethod
    def update(self, index: int, prediction: Any, targets: Tensor | None = None, /) -> None:
        """Add what the current sample predicts for batch number ``index``."""

    @abstractmethod
    def _start(self, index: int, prediction: Any, targets: Tensor | None) -> None:
        """Begin the sums of batch ``index`` with the first sample's prediction."""

    @abstractmethod
    def _add(self, index: int, prediction: Any, targets: Tensor | None) -> None:
        """Add a further sample's prediction."""

    @abstractmethod
    def _fits(self, index: int, prediction: Any) -> bool:
        """Whether a prediction has the shape of the first sample's."""

    @abstractmethod
    def batches(self) -> Iterator[tuple[Any, Tensor | None]]:
        """Prediction of the ensemble, and targets, of each batch."""

    def _append(self, index: int, prediction: Any, targets: Tensor | None) -> None:
        if index != self._next:
            raise ValueError(f"Batch {self._next} of a sample must come next, got {index}.")
        if self.num_samples == 0:
            self._start(index, prediction, targets)
            self._targets.append(None if targets is None else targets.clone())
        else:
            self._check_same(index, prediction, targets)
            self._add(index, prediction, targets)
        self._next = index + 1

    def _check_same(self, index: int, prediction: Any, targets: Tensor | None) -> None:
        if index < len(self._targets) and self._fits(index, prediction):
            first = self._targets[index]
            if (first is None) == (targets is None) and (first is None or torch.equal(first, targets)):  # type: ignore[arg-type]
                return
        raise ChangedBatchesError(
            f"Batch {index} is not the one that the first sample saw. Every sample needs the same batches in the same "
            "order: turn shuffling and random augmentation off."
        )

    def end_sample(self) -> None:
        """Close the current sample; the next update starts another.

        Raises:
            ChangedBatchesError: If it saw no batch, or fewer than the first sample.
        """
        if self._next == 0 or self._next != len(self._targets):
            raise ChangedBatchesError(
                f"A sample ended after {self._next} batches, the first saw {len(self._targets)}. Pass batches that can "
                "be iterated more than once (a DataLoader, a list), and not none."
            )
        self.num_samples += 1
        self._next = 0

    @property
    def targets(self) -> Tensor | None:
        """Targets of all test points, shape ``(points,)``; ``None`` if a batch had none."""
        known = [targets for targets in self._targets if targets is not None]
        return torch.cat(known) if len(known) == len(self._targets) else None
