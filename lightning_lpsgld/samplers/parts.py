"""Sampling a part of what an optimizer moves: the rest stays with that optimizer, state and schedulers included."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lpsgld.samplers.base import LangevinOptimizer
from lightning_lpsgld.samplers.companion import Companion

__all__ = ["sample_part"]


def sample_part(
    sampler: type[LangevinOptimizer], optimizer: Optimizer, sampled: Mapping[Tensor, float | None], **options: Any
) -> LangevinOptimizer:
    """Sample some of the parameters of an optimizer, which goes on moving the others in the same steps.

    Args:
        sampler: Class of the sampler.
        optimizer: Any optimizer whose ``step`` needs no closure. Sampled parameters leave its groups, which stay the
            same objects, so that LR schedulers go on; the learning rates of the sampler follow those groups.
        sampled: Parameters to sample, with their weight decay; ``None``: that of their group. Those that the optimizer
            does not hold (yet) count when they join by ``add_param_group``.
        options: As for :meth:`LangevinOptimizer.from_optimizer`.

    Returns:
        The sampler; its ``companion`` steps ``optimizer``, its ``param_groups`` and ``state`` hold both parts.

    Raises:
        TypeError: If the optimizer needs a closure.

    Example:
        >>> from lightning_lpsgld.samplers import SGLD
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> adam = torch.optim.AdamW(net.parameters(), lr=1e-3)
        >>> opt = sample_part(SGLD, adam, dict.fromkeys(net[1].parameters()), num_data=100)
        >>> [len(group["params"]) for group in opt.param_groups], len(opt.sampled_groups)
        ([2, 2], 1)
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates its closure many times a step, so it cannot move a part beside a sampler.")
    own: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for mine in _split_off(group, sampled):
            own.append(mine)
            sources.append(group)
    part = copy.copy(optimizer)
    part.param_groups, part.state = own, defaultdict(dict)
    made = sampler.from_optimizer(part, **options)
    made.accompany(Companion(optimizer, list(zip(made.param_groups, sources)), sampled))
    return made


def _split_off(group: dict[str, Any], sampled: Mapping[Tensor, float | None]) -> list[dict[str, Any]]:
    """Take the sampled parameters out of a group, in place; one group of them for every weight decay."""
    names = group.get("param_names", [""] * len(group["params"]))
    pairs = list(zip(group["params"], names))
    options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    found = []
    for decay in dict.fromkeys(sampled[p] for p in group["params"] if p in sampled):
        chosen = [(p, name) for p, name in pairs if p in sampled and sampled[p] == decay]
        mine = {**options, "params": [p for p, _ in chosen]}
        if decay is not None:
            mine["weight_decay"] = decay
        if "param_names" in group:
            mine["param_names"] = [name for _, name in chosen]
        found.append(mine)
    kept = [(p, name) for p, name in pairs if p not in sampled]
    group["params"][:] = [p for p, _ in kept]
    if "param_names" in group:
        group["param_names"][:] = [name for _, name in kept]
    return found
