"""What cannot work is refused before training starts, by name, with the way out."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as pl_callbacks
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_lpsgld.arguments import require_flag, require_int, require_number, require_seed
from lightning_lpsgld.arithmetic import ARITHMETICS, refusal_of_format
from lightning_lpsgld.formats import FormatLike, check_dtype, parse_format
from lightning_lpsgld.ops.dispatch import BACKENDS
from lightning_lpsgld.precision.changes import ON_CHANGE
from lightning_lpsgld.precision.prior import names_a_file
from lightning_lpsgld.samplers import LangevinOptimizer
from lightning_lpsgld.samplers.grid import GridSampler
from lightning_lpsgld.samplers.step_size import checked_schedule

__all__ = [
    "check_arguments", "names_or_types", "refuse_averaging", "refuse_unsupported", "refuse_wide_formats", "unwrapped",
]  # fmt: skip

#: Callbacks that average ``parameters()``; WeightAveraging and its EMA came with Lightning 2.6.
_AVERAGING = tuple(
    vars(pl_callbacks)[name] for name in ("StochasticWeightAveraging", "WeightAveraging") if name in vars(pl_callbacks)
)


_HINTS = {
    "compute": " fp16 would need a GradScaler, which a sampler cannot use.",
    "prior_mean": " A file of weights is named with its suffix, e.g. 'runs/last.ckpt'.",
}


def check_arguments(plugin: Any) -> None:
    """Arguments of the plugin that are wrong whatever the run.

    Raises:
        TypeError: If one is of the wrong type.
        ValueError: Naming the argument, the rule and the value.
    """
    owner = "LowPrecisionSGLD"
    _check_choices(plugin, owner)
    if plugin.formats["weights"] is None and not isinstance(plugin.accumulator, str):
        raise ValueError(
            f"{owner}: `accumulator` is {plugin.accumulator}, and `weights`, its rounded view, is None. Give a "
            f"format of the weights, or leave `accumulator` at 'low' and take weights={str(plugin.accumulator)!r}."
        )
    for name in ("variance_corrected", "compress_gradients", "cast_frozen"):
        require_flag(name, getattr(plugin, name), owner=owner)
    if require_number("temperature", plugin.temperature, above=-math.inf, owner=owner) < 0:
        raise ValueError(f"{owner}: `temperature` must be >= 0, got {plugin.temperature}.")
    if plugin.seed is not None:
        require_seed("seed", plugin.seed, owner=owner)
    if plugin.num_data != "auto" and (not _is_int(plugin.num_data) or plugin.num_data < 1):
        raise ValueError(f"{owner}: `num_data` must be 'auto' or an int >= 1, got {plugin.num_data!r}.")
    if not _is_int(plugin.check_replicas) or plugin.check_replicas < 0:
        raise ValueError(f"{owner}: `check_replicas` must be an int >= 0, got {plugin.check_replicas!r}.")
    stds = plugin.prior_std if isinstance(plugin.prior_std, Mapping) else {"": plugin.prior_std}
    for value in (value for value in stds.values() if value is not None):
        require_number("prior_std", value, above=0.0, owner=owner)
    if plugin.loss_scale is not None:
        require_number("loss_scale", plugin.loss_scale, above=0.0, owner=owner)
    _check_schedule(plugin.schedule, plugin.cycles, owner)
    _check_sampler(plugin.sampler)


def _check_choices(plugin: Any, owner: str) -> None:
    choices = {
        "backend": (plugin.backend, ("auto", *BACKENDS)),
        "saved_activations": (plugin.saved_activations, ("full", "codes")),
        **({} if names_a_file(plugin.prior_mean) else {"prior_mean": (plugin.prior_mean, ("zero", "initial"))}),
        "compute": (plugin.compute, ("32-true", "bf16-mixed")),
        "on_change": (plugin.on_change, ON_CHANGE),
        "arithmetic": (plugin.arithmetic, ARITHMETICS),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            hint = _HINTS.get(name, "")
            raise ValueError(f"{owner}: `{name}` must be one of {allowed}, got {value!r}.{hint}")
    refusal = refusal_of_format(plugin.formats["activations"])
    if plugin.arithmetic == "integer" and refusal is not None:
        raise ValueError(
            f"{owner}: arithmetic='integer' multiplies codes of activations, but {refusal}. Use "
            "activations='bfp8' or 'fixed8.6', or arithmetic='auto'."
        )


def _check_schedule(schedule: Any, cycles: Any, owner: str) -> None:
    if schedule is not None:
        checked_schedule(schedule, owner=owner)
    if cycles is not None and (require_int("cycles", cycles, owner=owner) < 1 or schedule is not None):
        raise ValueError(f"{owner}: `cycles` must be >= 1 and excludes `schedule`.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_sampler(sampler: Any) -> None:
    kind = sampler.func if isinstance(sampler, functools.partial) else sampler
    if not isinstance(kind, type) or not issubclass(kind, LangevinOptimizer):
        raise TypeError(
            "LowPrecisionSGLD: `sampler` must be a class of lightning_lpsgld.samplers, or a functools.partial of one, "
            f"got {sampler!r}. Write sampler=SGLD, or sampler=functools.partial(SGHMC, friction=2.0)."
        )


def names_or_types(name: str, value: Any) -> tuple[str | type[Module], ...]:
    """Patterns of names and module types, as ``exclude`` and ``sites`` take them: one, or several.

    Raises:
        TypeError: If there is anything else among them.
    """
    one = isinstance(value, (str, type))
    several: tuple[Any, ...] = (value,) if one else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(each, (str, type)) for each in several):
        raise TypeError(
            f"LowPrecisionSGLD: `{name}` must hold names of submodules (patterns) or module types, got {value!r}."
        )
    return several


def unwrapped(model: Module) -> pl.LightningModule:
    """The LightningModule inside a strategy's wrapper."""
    inner = getattr(model, "module", model)
    inner = inner if isinstance(inner, pl.LightningModule) else model
    assert isinstance(inner, pl.LightningModule), type(model)
    return inner


def refuse_unsupported(trainer: pl.Trainer, module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Raise if the run could only seem to work, whatever samples.

    Raises:
        RuntimeError: No optimizer, or a strategy that bypasses the sampler.
    """
    strategy = type(trainer.strategy).__name__
    if "DeepSpeed" in strategy or "FSDPStrategy" in strategy:
        raise RuntimeError(
            f"LowPrecisionSGLD does not run under {strategy}, which keeps parameters and optimizer to itself. Use "
            "DDPStrategy, or ModelParallelStrategy (FSDP2) for sharding."
        )
    if not any(group["params"] for optimizer in optimizers for group in optimizer.param_groups):
        raise RuntimeError(
            f"{type(module).__name__}.configure_optimizers returned no optimizer, so there is no step to replace. "
            "Return one, e.g. torch.optim.SGD(self.parameters(), lr=0.1)."
        )


def refuse_averaging(trainer: pl.Trainer, samplers: Sequence[LangevinOptimizer]) -> None:
    """Raise for a callback that averages ``parameters()`` where a sampler has them as rounded views of its sums.

    Raises:
        RuntimeError: Naming the callback.
    """
    views = any(
        isinstance(sampler, GridSampler) and sampler.keeps_sum(param)
        for sampler in samplers
        for group in sampler.sampled_groups
        for param in group["params"]
    )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if views and isinstance(callback, _AVERAGING):
            raise RuntimeError(
                f"{type(callback).__name__} averages `parameters()`, which beside an accumulator is only "
                "the rounded view of the chain, and would overwrite it behind the accumulator's back. Use "
                "SampleCollector with EnsembleEvaluation, or accumulator='low'."
            )


def refuse_wide_formats(module: Module, params: Iterable[Tensor], formats: Mapping[str, FormatLike | None]) -> None:
    """Raise for a format that the dtype of a parameter cannot hold.

    Args:
        module: Its parameters give their names.
        params: Those that are to be rounded.
        formats: Role -> format that its sampler will have.

    Raises:
        ValueError: Naming the role, the format and the parameter.
    """
    held = {id(p) for p in params}
    for name, param in module.named_parameters():
        if id(param) not in held or not param.requires_grad or not param.is_floating_point():
            continue
        for role, fmt in formats.items():
            try:
                if fmt is not None:
                    check_dtype(parse_format(fmt), param.dtype)
            except (TypeError, ValueError) as error:
                raise ValueError(f"LowPrecisionSGLD({role}={str(fmt)!r}) cannot hold {name}: {error}") from error
