r"""Step-size schedules in steps, as frozen data: a factor on the learning rate, and whether noise is injected.

They multiply the ``lr`` of a parameter group, so they compose with any scheduler of ``torch.optim.lr_scheduler``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

__all__ = ["ConstantStepSize", "CyclicalStepSize", "PolynomialStepSize", "StepSize"]


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
    """Factor 1 and noise at every step; burn-in is the collector's business."""

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

    Reference:
        Welling & Teh, 2011, "Bayesian learning via stochastic gradient Langevin dynamics", section 2.
    """

    offset: float
    power: float = 0.55

    def __post_init__(self) -> None:
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

    Args:
        cycle_length: C, steps of a cycle (the paper: total steps // number of cycles).
        sampling_steps: The last steps of a cycle that form its sampling stage, 1 to C; samples are drawn there.
        noise_in: ``"every-step"``: noise at every step, as the code of Zhang et al. 2022 does (cSGLD-F,
            VC cSGLDLP-L). ``"sampling-stage"``: plain SGD while exploring, noise in the sampling stage only, as in the
            cyclical SG-MCMC paper of 2020.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> schedule = CyclicalStepSize(cycle_length=100, sampling_steps=20, noise_in="sampling-stage")
        >>> schedule.factor(0), schedule.noise(79), schedule.noise(80), schedule.cycle(250)
        (1.0, False, True, 2)

    Reference:
        Zhang et al., 2020, "Cyclical stochastic gradient MCMC", arXiv:1902.03932, equation 1;
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909.
    """

    cycle_length: int
    sampling_steps: int = 1
    noise_in: Literal["every-step", "sampling-stage"] = "every-step"

    def __post_init__(self) -> None:
        if self.cycle_length < 1 or not 1 <= self.sampling_steps <= self.cycle_length:
            raise ValueError(
                f"CyclicalStepSize: needs `cycle_length` >= 1 and 1 <= `sampling_steps` <= `cycle_length`, got {self}."
            )
        if self.noise_in not in ("every-step", "sampling-stage"):
            raise ValueError(
                f"CyclicalStepSize: `noise_in` must be 'every-step' or 'sampling-stage', got {self.noise_in!r}."
            )

    def factor(self, step: int) -> float:
        """Factor on the group's learning rate, in (0, 1]."""
        return 0.5 * (math.cos(math.pi * (step % self.cycle_length) / self.cycle_length) + 1.0)

    def sampling(self, step: int) -> bool:
        """Whether step ``step`` belongs to the sampling stage of its cycle."""
        return step % self.cycle_length >= self.cycle_length - self.sampling_steps

    def noise(self, step: int) -> bool:
        """Whether Langevin noise is injected at this step."""
        return self.noise_in == "every-step" or self.sampling(step)

    def cycle(self, step: int) -> int:
        """Number of the cycle, from 0."""
        return step // self.cycle_length
