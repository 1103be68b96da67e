"""The user's optimizers become samplers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lightning_lpsgld.ops.coded import CodedTensor
from lightning_lpsgld.precision.checks import refuse_wide_formats
from lightning_lpsgld.precision.prior import Prior
from lightning_lpsgld.precision.run import RunDescription
from lightning_lpsgld.precision.variance_reduction import check_variance_reduced
from lightning_lpsgld.random import derive_seed
from lightning_lpsgld.samplers import LangevinOptimizer, VarianceReduced, sample_part
from lightning_lpsgld.samplers.shards import local_part
from lightning_lpsgld.samplers.updates import count_saturated

__all__ = ["round_parameters", "take_over"]


def take_over(
    optimizers: Sequence[Optimizer],
    module: pl.LightningModule,
    run: RunDescription,
    sampler: Callable[..., LangevinOptimizer],
    options: Mapping[str, Any],
    prior: Prior,
) -> list[Optimizer]:
    """Make a sampler of every optimizer that holds something to sample.

    One that is a sampler already is kept, with the seed of its chain; one all of whose parameters are sampled shares
    its groups; one of which a part is sampled becomes the sampler's companion.

    Args:
        optimizers: Of the module.
        module: Its parameters give their names.
        run: The run.
        sampler: Class of the samplers, or a partial of one, whose keywords win.
        options: What is asked of a sampler beside what follows from the run.
        prior: What is asked of it beside the optimizers' weight decay.

    Returns:
        A sampler for each optimizer, or the optimizer itself where nothing of it is sampled.

    Raises:
        RuntimeError: If a sampler cannot run as the run would have it.
        TypeError: If an option asks for something that the sampler does not do.
        ValueError: For a format that is wider than a parameter's dtype.
    """
    factory: Any = sampler
    rounded = run.formats["weights"] is not None or run.formats["gradients"] is not None
    asked: dict[str, Any] = {
        "num_data": run.num_data,
        "weight_format": run.formats["weights"],
        "gradient_format": run.formats["gradients"],
        "schedule": run.schedule,
        "full_precision": [module.get_parameter(name) for name in run.parts.exempt if rounded],
        "prior_mean": prior.mode,
        **options,
    }
    if isinstance(factory, functools.partial):
        factory, asked = factory.func, {**asked, **factory.keywords}
    sampled = prior.decays(module, run.parts.chosen, run.num_data)
    connected: list[Optimizer] = []
    for number, optimizer in enumerate(optimizers):
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        made: Optimizer
        if isinstance(inner, LangevinOptimizer):
            if run.parts.trained or prior.asks:
                raise RuntimeError(
                    f"{type(module).__name__}.configure_optimizers returned a {type(inner).__name__}, which samples "
                    "what it was given; `sampled`, `prior_mean` and `prior_std` say how samplers are made of a torch "
                    "optimizer. Return one, or give the sampler its parameters, weight decay and `prior_mean` yourself."
                )
            for group in inner.param_groups:
                group["seed"] = run.topology.seed_of(group["seed"])
            made = inner
        else:
            seed = run.chain_seed if number == 0 else derive_seed(run.chain_seed, "optimizer", number)
            made = _sampler_of(module, inner, factory, sampled, {"seed": seed, **asked})
        if isinstance(made, LangevinOptimizer):
            made.name_parameters(module.named_parameters())
        if isinstance(made, VarianceReduced):
            _refuse_mixed_chains(made, run)
            check_variance_reduced(made, module, run.accumulate)
        connected.append(made)
    prior.take_up(connected, module, run.parts.chosen)
    return connected


def _sampler_of(
    module: pl.LightningModule,
    optimizer: Optimizer,
    factory: Any,
    sampled: Mapping[Tensor, float | None],
    options: dict[str, Any],
) -> Optimizer:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    mine = [p for p in held if p in sampled]
    if not mine:
        return optimizer
    formats = {"weights": options.get("weight_format"), "gradients": options.get("gradient_format")}
    refuse_wide_formats(module, mine, formats)
    if len(mine) == len(held) and all(sampled[p] is None for p in mine):
        whole: LangevinOptimizer = factory.from_optimizer(optimizer, **options)
        return whole
    made = sample_part(factory, optimizer, sampled, **options)
    if isinstance(made, VarianceReduced) and len(mine) < len(held):
        raise RuntimeError(
            f"{type(made).__name__} evaluates the loss at two points of all parameters, so it cannot sample a part "
            f"while {type(optimizer).__name__} moves the rest. Use SGLD, SGHMC or PreconditionedSGLD, or freeze the "
            "rest."
        )
    return made


def round_parameters(samplers: Sequence[LangevinOptimizer]) -> float:
    """Bring all parameters onto their grids; share of values that lay outside their range."""
    outside, count = 0, 0
    for sampler in samplers:
        for param in (p for g in sampler.sampled_groups for p in g["params"] if p.requires_grad):
            fmt = sampler.format_of(param)
            mine = local_part(param.detach())  # of shards this rank's: sums over DTensors are not of all ranks
            count += mine.numel()
            if isinstance(param, CodedTensor):
                continue
            outside += 0 if fmt is None or not mine.numel() else int(count_saturated(mine, fmt))
        sampler.round_parameters_()
    return outside / max(count, 1)


def _refuse_mixed_chains(sampler: VarianceReduced, run: RunDescription) -> None:
    if run.topology.chain is not None:
        raise RuntimeError(
            f"{type(sampler).__name__} averages its full gradient over all ranks, and would mix the chains of "
            f"{run.strategy}. Use DDPStrategy, or SGLD."
        )
