"""What a collector reads off a run: its sampler, its length, the grids of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.samplers import CyclicalStepSize, LangevinOptimizer

__all__ = ["cycles_of", "formats_of", "full_tensors", "optimizer_of", "start_in_steps", "total_steps_of"]


@runtime_checkable
class _OnGrid(Protocol):
    """A sampler that keeps parameters on grids."""

    def format_of(self, param: Tensor) -> NumberFormat | None: ...


def optimizer_of(trainer: pl.Trainer) -> Optimizer:
    """The sampler, or the first optimizer where there is none."""
    samplers = [o for o in trainer.optimizers if isinstance(o, LangevinOptimizer)]
    optimizer: Optimizer = (samplers or trainer.optimizers)[0]
    return optimizer


def total_steps_of(trainer: pl.Trainer) -> float:
    """Optimizer steps of the whole run; infinite if they are not known."""
    total = float(trainer.estimated_stepping_batches)
    return total if total >= 0 else math.inf  # Lightning says -1 for data without a length


def start_in_steps(start: int | float, trainer: pl.Trainer) -> int:
    """A collector's ``start`` in optimizer steps; a float is a fraction of the run."""
    if isinstance(start, int):
        return start
    total = total_steps_of(trainer)
    if math.isinf(total):
        raise ValueError(
            f"SampleCollector: start={start} is a fraction of the run, whose number of steps is not known. "
            "Set `max_steps`, or give `start` in steps."
        )
    return int(start * total)


def cycles_of(trainer: pl.Trainer) -> CyclicalStepSize | None:
    """The sampler's cycles, if it has any."""
    optimizer = optimizer_of(trainer)
    schedule = optimizer.schedule if isinstance(optimizer, LangevinOptimizer) else None
    return schedule if isinstance(schedule, CyclicalStepSize) else None


def formats_of(
    trainer: pl.Trainer, pl_module: pl.LightningModule, bank: SampleBank | None = None
) -> dict[str, NumberFormat | None]:
    """Grid of every parameter that a sampler keeps on one, by name.

    What the samples of ``bank`` hold as floats stays so, exactly: a parameter that was frozen at the first sample and
    has joined the chain since.
    """
    floats = set() if bank is None or bank.spec is None else {e.name for e in bank.spec.entries if e.format is None}
    grids: dict[Tensor, NumberFormat | None] = {}
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, _OnGrid):
            grids.update({p: optimizer.format_of(p) for group in optimizer.param_groups for p in group["params"]})
    # ``torch.compile`` puts `_orig_mod.` into names; the bank leaves it out
    named = {name.replace("_orig_mod.", ""): p for name, p in pl_module.named_parameters()}
    return {name: grids[p] for name, p in named.items() if p in grids and name not in floats}


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors gathered, the others as they are; a collective call where there are any."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
