"""Replicas of a data-parallel run: watched, that they stay one chain; and their gradients averaged in 8 bits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from lightning_lpsgld.distributed import (
    GradientCompression,
    gather_as_codes,
    refuse_different_settings,
    refuse_forked_replicas,
)
from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.precision.run import RunDescription
from lightning_lpsgld.samplers import LangevinOptimizer, VarianceReduced

__all__ = ["ReplicaGuard", "ShardGathering", "compressed"]

_SETTINGS = ("seed", "step", "lr")


class ReplicaGuard:
    """Compares the replicas of a run before its first step and every n steps; does nothing where there are none.

    Replicas exist under ``DDPStrategy`` and what derives from it; sharded parameters are not replicas. DDP synchronizes
    gradients only, so that weights which differ once differ for ever.

    Args:
        every: Steps between two comparisons of all weights; 0: never. Settings are compared all the same.
        run: The fit; another one needs another guard.
        settings: What makes its chain what it is and no sampler has, as plain values by name.
    """

    def __init__(self, every: int, run: RunDescription, settings: Mapping[str, Any]) -> None:
        self._replicated = run.replicated and run.topology.replicas > 1
        self.every = every if self._replicated else 0
        self._settings = {**settings, "check_replicas": every}
        self._ranks, self._device = run.topology.group, run.device
        self._started: set[int] = set()

    def before_step(self, sampler: LangevinOptimizer) -> None:
        """Before the first step of a fit: settings and weights must agree.

        Raises:
            ForkedReplicasError: If they do not.
        """
        if not self._replicated or id(sampler) in self._started:
            return
        self._started.add(id(sampler))
        run = {name: value for name, value in self._settings.items() if name != "seed"}
        settings: dict[str, Any] = {**run, **sampler.settings()}
        for i, group in enumerate(sampler.param_groups):
            where = "" if len(sampler.param_groups) == 1 else f" of parameter group {i}"
            settings.update({name + where: _plain(group.get(name)) for name in _SETTINGS})
        refuse_different_settings(settings, self._device, self._ranks)
        if self.every:
            refuse_forked_replicas(_tensors(sampler), sampler.steps, self._ranks)

    def after_step(self, sampler: LangevinOptimizer) -> None:
        """After a step: every n-th time, weights and accumulators must agree.

        Raises:
            ForkedReplicasError: If they do not; on all ranks of the replica group.
        """
        if self.every and sampler.steps % self.every == 0:
            refuse_forked_replicas(_tensors(sampler), sampler.steps, self._ranks)


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


class ShardGathering:
    """FSDP2 gathers what samplers keep on a grid as codes, as long as a fit lasts; nothing without FSDP2."""

    def __init__(self) -> None:
        self._module: Callable[[], Module | None] = lambda: None

    def begin(self, module: Module, samplers: Sequence[LangevinOptimizer]) -> None:
        """From now on the weights of these samplers lie on their grids; says what a gather brings."""
        formats: dict[int, NumberFormat | None] = {
            id(param): sampler.format_of(param)
            for sampler in samplers
            if not isinstance(sampler, VarianceReduced)  # moves weights by offsets from a centre
            for group in sampler.sampled_groups
            for param in group["params"]
        }
        now, floats = gather_as_codes(module, lambda param: formats.get(id(param)))
        self._module = weakref.ref(module)
        if floats:
            sizes = f"{now / 1e6:.3g} MB for all weights instead of {floats / 1e6:.3g} MB"
            rank_zero_info(f"LowPrecisionSGLD: FSDP2 gathers codes: {sizes}.")

    def end(self) -> None:
        """Weights may leave their grids: floats are gathered again."""
        module = self._module()
        if module is not None:
            gather_as_codes(module, lambda param: None)


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
