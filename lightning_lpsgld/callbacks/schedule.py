"""Which steps give a sample: a pure function of the step number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lightning_lpsgld.samplers.step_size import CyclicalStepSize

__all__ = ["CollectionSchedule", "check_start"]


@dataclass(frozen=True)
class CollectionSchedule:
    r"""Burn-in, thinning, and the last samples of each cycle.

    Steps are counted from 1: step s is the state after s optimizer steps. With thinning n and burn-in b it is kept if

    .. math::
        s > b \quad\text{and}\quad (s - b) \bmod n = 0,

    and with ``per_cycle`` = k and cycles of C steps, of which :math:`r = (C - s \bmod C) \bmod C` remain, if

    .. math::
        s > b, \quad r \bmod n = 0, \quad r / n < k .

    Args:
        start: b >= 0, steps discarded as burn-in.
        every: n >= 1 steps, or ``"epoch"``: the last step of each epoch.
        per_cycle: k >= 1, or ``None``.
        cycle_length: C >= 1 steps; needed with ``per_cycle``.
        epoch_length: Optimizer steps of an epoch; needed with ``every="epoch"`` and ``per_cycle``.
        cycles: The sampler's cycles, where their lengths differ; ``None``: all have ``cycle_length`` steps.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> schedule = CollectionSchedule(start=10, every=5)
        >>> [s for s in range(31) if schedule.due(s)]
        [15, 20, 25, 30]
        >>> schedule = CollectionSchedule(every=2, per_cycle=3, cycle_length=10)
        >>> [s for s in range(21) if schedule.due(s)]
        [6, 8, 10, 16, 18, 20]
    """

    start: int = 0
    every: int | Literal["epoch"] = 1
    per_cycle: int | None = None
    cycle_length: int | None = None
    epoch_length: float | None = None
    cycles: CyclicalStepSize | None = None

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"`start` must be >= 0 optimizer steps, got {self.start}.")
        if self.every != "epoch" and self.every < 1:
            raise ValueError(f"`every` must be an int >= 1 or 'epoch', got {self.every!r}.")
        if self.per_cycle is None:
            return
        if self.per_cycle < 1:
            raise ValueError(f"`per_cycle` must be >= 1 samples, got {self.per_cycle}.")
        if self.cycle_length is None or self.cycle_length < 1:
            raise ValueError(f"`per_cycle` needs a cycle length >= 1 steps, got {self.cycle_length}.")
        spacing = self.epoch_length if self.every == "epoch" else self.every
        shortest = self._cycles.shortest
        if spacing is not None and (self.per_cycle - 1) * spacing >= shortest:
            raise ValueError(
                f"{self.per_cycle} samples per cycle, {spacing:g} steps apart, do not fit into a cycle of "
                f"{shortest} steps. Take fewer or closer ones."
            )

    @property
    def _cycles(self) -> CyclicalStepSize:
        assert self.cycle_length is not None
        return CyclicalStepSize(self.cycle_length) if self.cycles is None else self.cycles

    def remaining(self, step: int) -> int:
        """Steps that remain of the cycle after ``step`` steps; 0 at its end."""
        return self._cycles.remaining(step - 1)

    def cycle(self, step: int) -> int | None:
        """Number of the cycle, from 0, that step number ``step`` (from 1) belongs to; ``None`` without cycles."""
        return None if self.cycle_length is None or step < 1 else self._cycles.cycle(step - 1)

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` steps is kept; with ``every="epoch"``: if an epoch ends there."""
        if step <= self.start:
            return False
        if self.per_cycle is None:
            return self.every == "epoch" or (step - self.start) % self.every == 0
        if self.every == "epoch":
            return self.remaining(step) < self.per_cycle * (self.epoch_length or math.inf)
        return self.remaining(step) % self.every == 0 and self.remaining(step) // self.every < self.per_cycle

    def due_within(self, first: int, last: int) -> bool:
        """Whether any step in ``first`` to ``last``, both included, is due."""
        return any(self.due(step) for step in range(max(first, self.start + 1), last + 1))

    def hopeless(self, taken: int, total: float) -> bool:
        """Whether it is certain that no step after the first ``taken`` of ``total`` gives a sample."""
        if math.isinf(total):
            return False
        period = 1 if self.every == "epoch" else self.every
        if self.per_cycle is not None and self.cycle_length is not None:
            period = self.cycle_length
        first = max(taken, self.start) + 1
        return not self.due_within(first, int(min(total, first + period)))


def check_start(start: Any) -> None:
    """Refuse a burn-in that is neither a number of steps nor a fraction of the run.

    Raises:
        ValueError: With the value.
    """
    number = isinstance(start, (int, float)) and not isinstance(start, bool)
    if not number or not start >= 0 or (isinstance(start, float) and not start < 1):
        rule = "an int >= 0 (steps) or a float in [0, 1) (of the run)"
        raise ValueError(f"SampleCollector: `start` must be {rule}, got {start!r}.")
