"""What of a saved optimizer state goes back into a sampler, and how."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.samplers.companion import sampled_among
from lightning_lpsgld.samplers.step_size import schedule_settings

__all__ = ["chain_settings", "refuse_foreign_state", "restore_exactly", "take_steps"]


#: Arguments that are told otherwise, or that change no step that is made.
_NO_SETTINGS = {"num_data", "schedule", "weight_format", "gradient_format", "backend", "check_finite", "check_mu"}


def chain_settings(sampler: Any) -> dict[str, Any]:
    """What makes a sampler's chain what it is, seed and parameters excepted: plain values by the names of arguments.

    Args:
        sampler: A ``LangevinOptimizer``; what a class of the user's own keeps under the names of its arguments counts.

    Returns:
        Its class, N, schedule and formats, the values of its groups (a tuple where groups differ; the learning rate is
        that before any scheduler), and its own options.
    """
    rounded = {role: sampler.formats.get(role) for role in ("weights", "gradients")}
    plain = {"sampler": type(sampler).__name__, "num_data": sampler.num_data, **rounded, **_own_settings(sampler)}
    groups = _group_settings(sampler.sampled_groups, sampler.group_options)
    return {**plain, "schedule": schedule_settings(sampler.schedule), **groups}


def _group_settings(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Values of parameter groups by name; a tuple where groups differ, and the learning rate before any scheduler."""
    found: dict[str, Any] = {}
    for name in names:
        values = [g.get("initial_lr", g["lr"]) if name == "lr" else g[name] for g in groups]
        values = [None if value is None else float(value) for value in values]
        found[name] = values[0] if len(set(values)) == 1 else tuple(values)
    return found


def _own_settings(sampler: Any) -> dict[str, Any]:
    """Arguments of a sampler's class that it keeps under their own names: plain values, formats and dtypes as text."""
    found: dict[str, Any] = {}
    for name in inspect.signature(type(sampler)).parameters:
        value = getattr(sampler, name, inspect.Parameter.empty)
        if name in _NO_SETTINGS or value is inspect.Parameter.empty:
            continue
        if value is None or isinstance(value, (str, int, float)):
            found[name] = value
        elif isinstance(value, (NumberFormat, torch.dtype)):
            found[name] = str(value)
    return found


def refuse_foreign_state(owner: str, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state that no sampler saved.

    Raises:
        ValueError: If a group lacks what every sampler's has.
    """
    if any("step" not in group or "seed" not in group for group in sampled_among(state_dict["param_groups"])):
        raise ValueError(
            f"{owner}: this optimizer state has no `step` and `seed` in its groups, so it was not "
            "saved by a sampler. Start from the weights alone: LowPrecisionSGLD(start_from=...)."
        )


def take_steps(groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]], *, keep_lr: bool) -> None:
    """Put how many steps were made into groups, and the learning rates where they are kept; nothing else."""
    for i, group in enumerate(groups):
        group["step"] = saved[0]["step"]
        if keep_lr and i < len(saved):
            group.update({name: saved[i][name] for name in ("lr", "initial_lr") if name in saved[i]})


def restore_exactly(
    state: Mapping[Tensor, dict[str, Any]], groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> None:
    """``Optimizer.load_state_dict`` casts state to the parameter's dtype; take the saved bits instead."""
    order = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in groups for p in group["params"]]
    for number, param in zip(order, params):
        for name, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor) and name != "step" and value.dtype != state[param][name].dtype:
                state[param][name] = value.detach().to(param.device, copy=True)
