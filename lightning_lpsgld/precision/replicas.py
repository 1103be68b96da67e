"""Replicas of a data-parallel run: watched, that they stay one chain; and their gradients averaged in 8 bits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from lightning_lpsgld.distributed import GradientCompression, refuse_different_settings, refuse_forked_replicas
from lightning_lpsgld.samplers import LangevinOptimizer

__all__ = ["ReplicaGuard", "compressed"]

_SETTINGS = ("seed", "step", "temperature", "lr", "weight_decay")


class ReplicaGuard:
    """Compares the replicas of a run before its first step and every n steps; does nothing where there are none.

    Replicas exist under ``DDPStrategy`` and what derives from it; sharded parameters are not replicas. DDP synchronizes
    gradients only, so that weights which differ once differ for ever.

    Args:
        every: Steps between two comparisons of all weights; 0: never.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._started: set[int] = set()

    def restart(self) -> None:
        """A new fit begins."""
        self._started.clear()

    def _watches(self, trainer: pl.Trainer) -> bool:
        strategy: Any = trainer.strategy
        if not self.every or not isinstance(strategy, DDPStrategy):
            return False
        return getattr(strategy, "replicas", trainer.world_size) > 1

    def before_step(self, trainer: pl.Trainer, sampler: LangevinOptimizer) -> None:
        """Before the first step of a fit: settings and weights must agree.

        Raises:
            ForkedReplicasError: If they do not.
        """
        if id(sampler) in self._started or not self._watches(trainer):
            return
        self._started.add(id(sampler))
        settings: dict[str, Any] = {"num_data": sampler.num_data}
        for i, group in enumerate(sampler.param_groups):
            where = "" if len(sampler.param_groups) == 1 else f" of parameter group {i}"
            settings.update({name + where: _plain(group.get(name)) for name in _SETTINGS})
        ranks = getattr(trainer.strategy, "replica_group", None)
        refuse_different_settings(settings, trainer.strategy.root_device, ranks)
        refuse_forked_replicas(_tensors(sampler), sampler.steps, ranks)

    def after_step(self, trainer: pl.Trainer, sampler: LangevinOptimizer) -> None:
        """After a step: every n-th time, weights and accumulators must agree.

        Raises:
            ForkedReplicasError: If they do not; on all ranks of the replica group.
        """
        if self._watches(trainer) and sampler.steps % self.every == 0:
            refuse_forked_replicas(_tensors(sampler), sampler.steps, getattr(trainer.strategy, "replica_group", None))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _tensors(sampler: LangevinOptimizer) -> dict[str, Tensor]:
    """Parameters and their full accumulators, by name."""
    found: dict[str, Tensor] = {}
    for param in (p for group in sampler.param_groups for p in group["params"]):
        found[sampler.name_of(param)] = param.detach()
        state = sampler.state.get(param, {})
        if "accumulator" in state:
            found[f"the accumulator of {sampler.name_of(param)}"] = state["accumulator"]
    return found


def compressed(model: Module, seed: int, sampler: LangevinOptimizer) -> GradientCompression:
    """Let DDP average gradients in 8 bits, on any backend (strategies register hooks on CUDA only).

    Raises:
        RuntimeError: If the model is not wrapped in DDP.
    """
    if not isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            "LowPrecisionSGLD(compress_gradients=True) needs DDPStrategy, which averages gradients between ranks; here "
            f"the model is a {type(model).__name__}. Leave it off."
        )
    state = GradientCompression(seed, lambda: sampler.steps, model.process_group)
    model.register_comm_hook(state, GradientCompression.hook)  # type: ignore[arg-type]
    return state
