"""What a step must not be made with: values that stand in parameter groups, where anybody can set them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lpsgld.arguments import require_count, require_number, require_seed
from lightning_lpsgld.ops.coded import CodedTensor
from lightning_lpsgld.samplers.step_size import StepSize

__all__ = [
    "check_common_values", "check_parameters", "refuse_bad_values", "refuse_grad_scaler", "refuse_gradient",
]  # fmt: skip


def check_common_values(group: Mapping[str, Any]) -> None:
    """Refuse what no sampler can step with.

    Raises:
        TypeError: If a value is not a number.
        ValueError: If ``lr``, ``weight_decay`` or ``temperature`` is negative, NaN or infinite, or ``seed`` or ``step``
            no counter.
    """
    for name in ("lr", "weight_decay", "temperature"):
        require_number(name, group[name])
    require_seed("seed", group["seed"])
    require_count("step", group.get("step", 0), low=0)


def check_parameters(owner: str, group: Mapping[str, Any], *, takes_codes: bool) -> None:
    """Refuse parameters that cannot be moved.

    Args:
        owner: Class of the sampler, for messages.
        group: Of the sampler.
        takes_codes: Whether the sampler moves weights that are held as codes.

    Raises:
        TypeError: If one is not of a floating dtype, or is held as codes and must not be.
    """
    for param in group["params"]:
        if not param.is_floating_point():
            raise TypeError(f"Samplers move floating-point parameters, got one of {param.dtype}.")
        if isinstance(param, CodedTensor) and not takes_codes:
            raise TypeError(
                f"{owner} keeps floats beside every weight, so it does not move weights that are held as codes, and "
                f"one of shape {tuple(param.shape)} is. Use SGLD, or storage='float' (of a module by itself: "
                "lightning_lpsgld.ops.float_parameters_)."
            )


def refuse_bad_values(
    owner: str,
    groups: Sequence[Mapping[str, Any]],
    check: Callable[[Mapping[str, Any]], None],
    step_size: Callable[[Mapping[str, Any]], float],
    schedule: StepSize,
) -> None:
    """Refuse to step with what a scheduler, a callback or the schedule has set.

    Args:
        owner: Class of the sampler, for messages.
        groups: Its parameter groups.
        check: Rules of its groups.
        step_size: Learning rate of a group's current step.
        schedule: Its schedule.

    Raises:
        TypeError, ValueError: As ``check``; ValueError also if the schedule's factor is negative, NaN or infinite.
    """
    for number, group in enumerate(groups):
        where = f"{owner}, parameter group {number}, before step {groups[0]['step']} (nothing was changed)"
        try:
            check(group)
        except (TypeError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"{where}: {error} Look for a scheduler or callback that sets it.") from None
        size = step_size(group)
        if not (size >= 0 and math.isfinite(size)):
            factor = schedule.factor(group["step"])
            raise ValueError(f"{where}: the schedule's factor must be finite and >= 0, got {factor} of {schedule!r}.")


def refuse_grad_scaler(owner: str, scale: Any) -> None:
    """Refuse a step that ``torch.amp.GradScaler`` drives, which hands over its scale: TypeError."""
    if scale is not None:
        raise TypeError(
            f"{owner} cannot be stepped by a GradScaler: skipped steps and scaled gradients break "
            "the chain. Use float32, or bfloat16 autocast (LowPrecisionSGLD(compute='bf16-mixed')), without scaler."
        )


def refuse_gradient(owner: str, param: Tensor, name: str, *, takes_shards: bool) -> None:
    """Refuse a parameter that cannot be moved along its gradient.

    Args:
        owner: Class of the sampler, for messages.
        param: A parameter with a gradient.
        name: Its name.
        takes_shards: Whether the sampler moves sharded parameters.

    Raises:
        TypeError: If the gradient is sparse, or the parameter is sharded and must not be.
    """
    if isinstance(param, DTensor) and not takes_shards:
        raise TypeError(
            f"{owner} does not move sharded parameters, and {name} is a DTensor. SGLD does; or use DDPStrategy."
        )
    assert param.grad is not None
    if param.grad.layout != torch.strided:
        raise TypeError(
            f"{owner}: the gradient of {name} has layout {param.grad.layout}; samplers take dense gradients. Set "
            "`sparse=False` on the embedding."
        )
