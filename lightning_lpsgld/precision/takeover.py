"""The user's optimizers become samplers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from lightning_lpsgld.precision.run import RunDescription
from lightning_lpsgld.precision.variance_reduction import check_variance_reduced
from lightning_lpsgld.random import derive_seed
from lightning_lpsgld.samplers import LangevinOptimizer, VarianceReduced
from lightning_lpsgld.samplers.updates import saturated

__all__ = ["round_parameters", "take_over"]


def take_over(
    optimizers: Sequence[Optimizer],
    module: pl.LightningModule,
    run: RunDescription,
    sampler: Callable[..., LangevinOptimizer],
    options: Mapping[str, Any],
) -> list[LangevinOptimizer]:
    """Make a sampler of every optimizer; one that is a sampler already is kept, with the seed of its chain.

    Args:
        optimizers: Of the module.
        module: Its parameters give their names.
        run: The run.
        sampler: Class of the samplers, or a partial of one, whose keywords win.
        options: What is asked of a sampler beside what follows from the run.

    Returns:
        One sampler per optimizer.

    Raises:
        RuntimeError: If a sampler cannot run as the run would have it.
        TypeError: If an option asks for something that the sampler does not do.
    """
    factory: Any = sampler
    rounded = run.formats["weights"] is not None or run.formats["gradients"] is not None
    asked: dict[str, Any] = {
        "num_data": run.num_data,
        "weight_format": run.formats["weights"],
        "gradient_format": run.formats["gradients"],
        "schedule": run.schedule,
        "full_precision": [module.get_parameter(name) for name in run.parts.exempt if rounded],
        **options,
    }
    if isinstance(factory, functools.partial):
        factory, asked = factory.func, {**asked, **factory.keywords}
    samplers = []
    for number, optimizer in enumerate(optimizers):
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if isinstance(inner, LangevinOptimizer):
            for group in inner.param_groups:
                group["seed"] = run.topology.seed_of(group["seed"])
            made = inner
        else:
            seed = run.chain_seed if number == 0 else derive_seed(run.chain_seed, "optimizer", number)
            made = factory.from_optimizer(inner, **{"seed": seed, **asked})
        made.name_parameters(module.named_parameters())
        if isinstance(made, VarianceReduced):
            _refuse_mixed_chains(made, run)
            check_variance_reduced(made, module, run.accumulate)
        samplers.append(made)
    return samplers


def round_parameters(samplers: Sequence[LangevinOptimizer]) -> float:
    """Bring all parameters onto their grids; share of values that lay outside their range."""
    outside, count = 0, 0
    for sampler in samplers:
        for param in (p for g in sampler.param_groups for p in g["params"] if p.requires_grad):
            fmt = sampler.format_of(param)
            count += param.numel()
            outside += 0 if fmt is None else int(saturated(param.detach(), fmt))
        sampler.round_parameters_()
    return outside / max(count, 1)


def _refuse_mixed_chains(sampler: VarianceReduced, run: RunDescription) -> None:
    if run.topology.chain is not None:
        raise RuntimeError(
            f"{type(sampler).__name__} averages its full gradient over all ranks, and would mix the chains of "
            f"{run.strategy}. Use DDPStrategy, or SGLD."
        )
