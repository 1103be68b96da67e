"""What Lightning gives a fit, as one frozen description: computed once, in order; all that comes after takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Module
from torch.optim import Optimizer

from lightning_lpsgld.distributed import Topology, topology_of
from lightning_lpsgld.formats import Accumulator, NumberFormat
from lightning_lpsgld.precision.checks import refuse_unsupported
from lightning_lpsgld.precision.num_data import Counted, forget_dataloader_when_resuming, training_examples
from lightning_lpsgld.precision.parts import Parts, parts_of
from lightning_lpsgld.samplers import CyclicalStepSize, StepSize

__all__ = ["RunDescription", "RunSettings", "describe_run"]


class RunSettings(Protocol):
    """What a description needs of the plugin's arguments; their meaning is documented there."""

    @property
    def formats(self) -> Mapping[str, NumberFormat | None]:
        """Role -> format."""

    @property
    def accumulator(self) -> Accumulator:
        """Where steps are summed."""

    @property
    def num_data(self) -> int | Literal["auto"]:
        """N, or to be counted."""

    @property
    def exclude(self) -> Sequence[str | type[Module]]:
        """Submodules in full precision."""

    @property
    def sampled(self) -> Sequence[str | type[Module]] | None:
        """What is sampled."""

    @property
    def schedule(self) -> StepSize | None:
        """Step-size schedule."""

    @property
    def cycles(self) -> int | None:
        """Number of cycles instead of a schedule."""


@dataclass(frozen=True)
class RunDescription:
    """A fit, as far as the sampler, its checks and its card have to know it.

    Attributes:
        num_data: N.
        data_note: How N was found, where it is not the length of the data set.
        weighted_data: Whether examples are drawn with weights.
        seed: Seed of the run, the same on all ranks and chains.
        topology: This rank's chain, and the ranks that share it.
        replicated: Whether the ranks of a chain hold copies of the weights, which could come apart (DDP).
        strategy: Class name of the strategy, for messages.
        device: This rank's device.
        automatic: Whether the module leaves the optimization to Lightning.
        accumulate: Batches per step when the fit begins.
        formats: Role -> format asked for.
        schedule: Step-size schedule, cycles resolved.
        parts: Which parameters are sampled, trained and frozen.
    """

    num_data: int
    data_note: str
    weighted_data: bool
    seed: int
    topology: Topology
    replicated: bool
    strategy: str
    device: torch.device
    automatic: bool
    accumulate: int
    formats: Mapping[str, NumberFormat | None]
    schedule: StepSize | None
    parts: Parts

    @property
    def chain_seed(self) -> int:
        """Seed of this rank's chain."""
        return self.topology.seed_of(self.seed)


def describe_run(
    trainer: pl.Trainer, module: pl.LightningModule, optimizers: Sequence[Optimizer], settings: RunSettings, seed: int
) -> RunDescription:
    """Describe a fit that is about to begin; refuses what could only seem to work.

    Args:
        trainer: The trainer; its train dataloader may be set up to count examples and steps.
        module: The module, unwrapped.
        optimizers: What its ``configure_optimizers`` returned.
        settings: The plugin's arguments.
        seed: Seed of the run, agreed between ranks.

    Raises:
        RuntimeError: See :func:`.checks.refuse_unsupported`.
        ValueError: If N, or the number of steps that cycles need, cannot be known; or for a format that is too wide.
    """
    refuse_unsupported(trainer, module, optimizers)
    counted = training_examples(trainer) if settings.num_data == "auto" else Counted(settings.num_data, "as given")
    schedule = _schedule(trainer, settings)
    forget_dataloader_when_resuming(trainer)
    strategy: Any = trainer.strategy
    return RunDescription(
        num_data=counted.count,
        data_note=counted.note,
        weighted_data=counted.weighted,
        seed=seed,
        topology=topology_of(strategy, trainer.world_size),
        replicated=isinstance(strategy, DDPStrategy),
        strategy=type(strategy).__name__,
        device=strategy.root_device,
        automatic=module.automatic_optimization,
        accumulate=trainer.accumulate_grad_batches,
        formats=MappingProxyType(dict(settings.formats)),
        schedule=schedule,
        parts=parts_of(module, optimizers, settings.sampled, settings.exclude),
    )


def _schedule(trainer: pl.Trainer, settings: RunSettings) -> StepSize | None:
    if settings.cycles is None:
        return settings.schedule
    total = trainer.estimated_stepping_batches
    if total == float("inf") or total < settings.cycles:
        raise ValueError(
            f"LowPrecisionSGLD: cycles={settings.cycles} needs at least that many optimizer steps and a known end of "
            f"the run, got {total}. Set `max_epochs` or `max_steps`, or pass `schedule=CyclicalStepSize(...)`."
        )
    shortest = int(total) // settings.cycles
    return CyclicalStepSize.spread(int(total), settings.cycles, sampling_steps=-(-shortest // 7))
