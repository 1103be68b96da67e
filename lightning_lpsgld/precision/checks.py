"""What cannot work is refused before training starts, by name, with the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch import callbacks as pl_callbacks
from torch.nn import Module
from torch.optim import Optimizer

from lightning_lpsgld.formats import NumberFormat, check_dtype

__all__ = ["refuse_unsupported", "unwrapped"]

#: Callbacks that average ``parameters()``; WeightAveraging and its EMA came with Lightning 2.6.
_AVERAGING = tuple(
    vars(pl_callbacks)[name] for name in ("StochasticWeightAveraging", "WeightAveraging") if name in vars(pl_callbacks)
)


def unwrapped(model: Module) -> pl.LightningModule:
    """The LightningModule inside a strategy's wrapper."""
    inner = getattr(model, "module", model)
    inner = inner if isinstance(inner, pl.LightningModule) else model
    assert isinstance(inner, pl.LightningModule), type(model)
    return inner


def refuse_unsupported(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    optimizers: Sequence[Optimizer],
    accumulator: str,
    formats: Mapping[str, NumberFormat | None],
) -> None:
    """Raise if the run could only seem to work.

    Raises:
        RuntimeError: No optimizer, a strategy that bypasses the sampler, or a callback that averages rounded views.
        ValueError: A format wider than the module's dtype.
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
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if accumulator == "full" and isinstance(callback, _AVERAGING):
            raise RuntimeError(
                f"{type(callback).__name__} averages `parameters()`, which with accumulator='full' is only the rounded "
                "view of the chain, and would overwrite it behind the accumulator's back. Use SampleCollector with "
                "EnsembleEvaluation, or accumulator='low'."
            )
    for name, param in module.named_parameters():
        if param.requires_grad and param.is_floating_point():
            _check_formats(name, param.dtype, formats)


def _check_formats(name: str, dtype: object, formats: Mapping[str, NumberFormat | None]) -> None:
    for role in ("weights", "gradients"):
        fmt = formats[role]
        if fmt is None:
            continue
        try:
            check_dtype(fmt, dtype)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"LowPrecisionSGLD({role}={str(fmt)!r}) cannot hold {name}: {error}") from error
