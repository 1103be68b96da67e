r"""Step-size schedules in steps, as frozen data: a factor on the learning rate, and whether noise is injected.

They multiply the ``lr`` of a parameter group, so they compose with any scheduler of ``torch.optim.lr_scheduler``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from lightning_lpsgld.arguments import require_int, require_number

__all__ = [
    "ConstantStepSize",
    "CyclicalStepSize",
    "PolynomialStepSize",
    "StepSize",
    "schedule_from_settings",
    "schedule_settings",
]


@runtime_checkable
class StepSize(Protocol):
    """What a sampler asks of a schedule; ``step`` counts optimizer steps from 0."""

    def factor(self, step: int) -> float:
        """Factor on the group's learning rate."""
        ...

    def noise(self, step: int) -> bool:
        """Whether Langevin noise is injected at this step."""
        ...


@dataclass(frozen=True)
class ConstantStepSize:
    """Factor 1 and noise at every step; burn-in is the collector's business.

    Example:
        >>> ConstantStepSize().factor(30), ConstantStepSize().noise(30)
        (1.0, True)
    """

    def factor(self, step: int) -> float:
        """Factor on the group's learning rate: 1."""
        return 1.0

    def noise(self, step: int) -> bool:
        """Whether Langevin noise is injected: always."""
        return True


@dataclass(frozen=True)
class PolynomialStepSize:
    r"""Polynomial decay :math:`(1 + k/b)^{-\gamma}`, which meets the conditions of SGLD for γ in (0.5, 1].

    Args:
        offset: b > 0, in steps.
        power: γ >= 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> PolynomialStepSize(offset=10.0, power=0.5).factor(30)
        0.5

    Reference:
        Welling & Teh, 2011, "Bayesian learning via stochastic gradient Langevin dynamics", section 2.
    """

    offset: float
    power: float = 0.55

    def __post_init__(self) -> None:
        for name in ("offset", "power"):
            require_number(name, getattr(self, name), above=-math.inf, owner="PolynomialStepSize")
        if not self.offset > 0 or not self.power >= 0:
            raise ValueError(f"PolynomialStepSize: needs `offset` > 0 and `power` >= 0, got {self}.")

    def factor(self, step: int) -> float:
        """Factor on the group's learning rate."""
        return float((1.0 + step / self.offset) ** -self.power)

    def noise(self, step: int) -> bool:
        """Whether Langevin noise is injected: always."""
        return True


@dataclass(frozen=True)
class CyclicalStepSize:
    r"""Cosine cycles: :math:`\tfrac12\left[\cos\left(\pi\,\frac{k \bmod C}{C}\right) + 1\right]` at step k.

    Two algorithms share the name "cyclical SG-MCMC"; ``noise_in`` says which one runs.

    For M cycles over K steps the first paper takes :math:`C = \lceil K/M \rceil`, which cuts the last cycle short; the
    code of the second takes :math:`\lfloor K/M \rfloor`, and steps that are left over begin a cycle too many, at the
    full learning rate. :meth:`spread` makes M whole cycles, of C or C - 1 steps, the last of which ends with the run.

    Args:
        cycle_length: C, steps of a cycle, of the longest one where they differ.
        sampling_steps: The last steps of a cycle that form its sampling stage, 1 to C; samples are drawn there.
        noise_in: ``"every-step"``: noise at every step, as the code of Zhang et al. 2022 does (cSGLD-F,
            VC cSGLDLP-L). ``"sampling-stage"``: plain SGD while exploring, noise in the sampling stage only, as in the
            cyclical SG-MCMC paper of 2020.
        cycles: M: cycle j begins at step :math:`\lfloor jK/M \rfloor`; ``None``: all have C steps.
        total_steps: K, with ``cycles``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> schedule = CyclicalStepSize(cycle_length=100, sampling_steps=20, noise_in="sampling-stage")
        >>> schedule.factor(0), schedule.noise(79), schedule.noise(80), schedule.cycle(250)
        (1.0, False, True, 2)
        >>> schedule = CyclicalStepSize.spread(total_steps=100, cycles=7)
        >>> schedule.cycle_length, [schedule.first(j) for j in range(8)]
        (15, [0, 14, 28, 42, 57, 71, 85, 100])

    Reference:
        Zhang et al., 2020, "Cyclical stochastic gradient MCMC", arXiv:1902.03932, equation 1;
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909.
    """

    cycle_length: int
    sampling_steps: int = 1
    noise_in: Literal["every-step", "sampling-stage"] = "every-step"
    cycles: int | None = None
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.noise_in not in ("every-step", "sampling-stage"):
            raise ValueError(
                f"CyclicalStepSize: `noise_in` must be 'every-step' or 'sampling-stage', got {self.noise_in!r}."
            )
        for name in ("cycle_length", "sampling_steps", "cycles", "total_steps"):
            if getattr(self, name) is not None or not name.startswith(("cycles", "total")):
                require_int(name, getattr(self, name), owner="CyclicalStepSize")
        if self.cycle_length < 1 or not 1 <= self.sampling_steps <= self.shortest:
            raise ValueError(
                f"CyclicalStepSize: needs `cycle_length` >= 1 and 1 <= `sampling_steps` <= `cycle_length`"
                f"{'' if self.cycles is None else ' - 1 (of the shorter cycles)'}, got {self}."
            )
        steps, count = self._period
        if self.cycle_length != -(-steps // count):
            raise ValueError(
                f"CyclicalStepSize: `cycle_length` must be `total_steps` / `cycles` rounded up, got {self}. Use "
                "CyclicalStepSize.spread(total_steps, cycles)."
            )

    @classmethod
    def spread(
        cls,
        total_steps: int,
        cycles: int,
        *,
        sampling_steps: int = 1,
        noise_in: Literal["every-step", "sampling-stage"] = "every-step",
    ) -> CyclicalStepSize:
        """Whole cycles over a run, whose lengths differ by at most one step; the last ends with the run.

        Args:
            total_steps: K >= M, optimizer steps of the run.
            cycles: M >= 1.
            sampling_steps: As in the class.
            noise_in: As in the class.

        Returns:
            The schedule; after step K it goes on with such cycles.

        Raises:
            ValueError: If an argument is out of range.
        """
        if not 1 <= cycles <= total_steps:
            raise ValueError(
                f"CyclicalStepSize.spread: needs 1 <= `cycles` <= `total_steps`, got {cycles} and {total_steps}."
            )
        return cls(-(-total_steps // cycles), sampling_steps, noise_in, cycles, total_steps)

    @property
    def _period(self) -> tuple[int, int]:
        """K and M; C and 1 where all cycles have C steps."""
        if (self.cycles is None) != (self.total_steps is None):
            raise ValueError(f"CyclicalStepSize: give both or neither of `cycles` and `total_steps`, got {self}.")
        return (
            (self.cycle_length, 1)
            if self.cycles is None or self.total_steps is None
            else (self.total_steps, self.cycles)
        )

    @property
    def shortest(self) -> int:
        """Steps of the shortest cycle."""
        steps, count = self._period
        return steps // count

    def cycle(self, step: int) -> int:
        """Number of the cycle that step ``step`` belongs to, from 0."""
        steps, count = self._period
        return ((step + 1) * count - 1) // steps

    def first(self, cycle: int) -> int:
        """First step of cycle number ``cycle``."""
        steps, count = self._period
        return cycle * steps // count

    def remaining(self, step: int) -> int:
        """Steps of the cycle that follow step ``step``; 0 for its last one."""
        return self.first(self.cycle(step) + 1) - 1 - step

    def factor(self, step: int) -> float:
        """Factor on the group's learning rate, in (0, 1]."""
        first = self.first(self.cycle(step))
        length = self.remaining(step) + 1 + step - first
        return 0.5 * (math.cos(math.pi * (step - first) / length) + 1.0)

    def sampling(self, step: int) -> bool:
        """Whether step ``step`` belongs to the sampling stage of its cycle."""
        return self.remaining(step) < self.sampling_steps

    def noise(self, step: int) -> bool:
        """Whether Langevin noise is injected at this step."""
        return self.noise_in == "every-step" or self.sampling(step)


def checked_schedule(schedule: Any, *, owner: str = "") -> StepSize:
    """A step-size schedule, if it is one.

    Raises:
        TypeError: If it lacks ``factor`` or ``noise``, or is the class of a schedule instead of one.
    """
    if isinstance(schedule, type) or not isinstance(schedule, StepSize):
        start = f"{owner}: " if owner else ""
        raise TypeError(
            f"{start}`schedule` must be a step-size schedule with `factor(step)` and `noise(step)`, such as "
            f"CyclicalStepSize(cycle_length=100), got {schedule!r}."
        )
    return schedule


_KINDS = {kind.__name__: kind for kind in (ConstantStepSize, PolynomialStepSize, CyclicalStepSize)}


def schedule_settings(schedule: StepSize) -> dict[str, Any]:
    """A schedule as plain values: its ``kind`` and, of a dataclass, its fields.

    Example:
        >>> schedule_settings(PolynomialStepSize(10.0))
        {'kind': 'PolynomialStepSize', 'offset': 10.0, 'power': 0.55}
    """
    fields: dict[str, Any] = asdict(schedule) if is_dataclass(schedule) and not isinstance(schedule, type) else {}
    return {"kind": type(schedule).__qualname__, **fields}


def schedule_from_settings(settings: Any) -> StepSize | None:
    """The schedule that :func:`schedule_settings` described, if it is one of this module; else ``None``.

    Example:
        >>> schedule_from_settings({"kind": "PolynomialStepSize", "offset": 10.0, "power": 0.55})
        PolynomialStepSize(offset=10.0, power=0.55)
    """
    kind = _KINDS.get(settings.get("kind", "")) if isinstance(settings, Mapping) else None
    return None if kind is None else kind(**{name: value for name, value in settings.items() if name != "kind"})
