"""A slowly moving divisor for gradients that their rounding shrinks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_lpsgld.samplers.grid import GridSampler

__all__ = ["Compensation"]


@dataclass(frozen=True)
class Compensation:
    r"""Keeps a sampler's :meth:`~.GridSampler.compensate` at the average of the measured q of every parameter.

    The divisor after the k-th measurement is :math:`\bar q_k = s\,\bar q_{k-1} + (1 - s)\,\min(\max(q_k, f), 1)`, the
    first :math:`\bar q` being the first measurement's. All of it is in the sampler's state.

    Args:
        until: Step from which on measurements are ignored and the divisors stay; ``None``: never.
        smoothing: s in [0, 1), the weight of the past.
        floor: f in (0, 1], below which no q is believed: the drift grows by at most 1/f.

    Raises:
        ValueError: If an argument is out of range; the message names it.

    Example:
        >>> Compensation(smoothing=0.5).averaged(0.5, 0.25)
        0.375
    """

    until: int | None = None
    smoothing: float = 0.9
    floor: float = 0.1

    def __post_init__(self) -> None:
        until = self.until
        if until is not None and (isinstance(until, bool) or not isinstance(until, int) or until < 1):
            raise ValueError(f"`compensate_until` must be an int >= 1, or None for never, got {until!r}.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {self.smoothing!r}.")
        if not 0 < self.floor <= 1:
            raise ValueError(f"`q_floor` must be in (0, 1], got {self.floor!r}.")

    def averaged(self, before: float | None, measured: float) -> float:
        """The next divisor from the last one (``None``: there was none) and a new measurement."""
        held = min(max(measured, self.floor), 1.0)
        return held if before is None else before + (1.0 - self.smoothing) * (held - before)

    def follow(self, sampler: GridSampler, param: Tensor, measured: float) -> None:
        """Move the divisor of a parameter towards ``measured``, found in the step just made."""
        if not math.isfinite(measured) or (self.until is not None and sampler.steps > self.until):
            return
        before = sampler.shrinkage_of(param) if "shrinkage" in sampler.state.get(param, {}) else None
        sampler.compensate(param, self.averaged(before, measured))
