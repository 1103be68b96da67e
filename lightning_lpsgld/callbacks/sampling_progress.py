"""What the sampler is doing, in the progress bar and in every logger."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_lpsgld.callbacks.collector import SampleCollector
from lightning_lpsgld.callbacks.effective_temperature import EffectiveTemperature
from lightning_lpsgld.callbacks.evaluation import EnsembleEvaluation

__all__ = ["SamplingProgress"]


class SamplingProgress(Callback):
    """Show and log, at every training batch, what the trainer's other callbacks know about the sampling.

    ``samples`` (collected so far), ``cycle`` (of a cyclical schedule), ``T_eff`` (of the last measured step) and
    ``ensemble_nll`` (of the last evaluation). Each appears when there is something to say: the first two from a
    :class:`.SampleCollector`, the others from :class:`.EffectiveTemperature` and :class:`.EnsembleEvaluation`. They go
    through ``LightningModule.log``, so they reach the tqdm and the rich progress bar and any logger (at its
    ``log_every_n_steps``).

    Args:
        prog_bar: Show them in the progress bar.
        logger: Send them to the loggers.

    Raises:
        RuntimeError: When training starts, if the trainer has none of those callbacks.

    Example:
        >>> SamplingProgress(logger=False).logger
        False
    """

    def __init__(self, prog_bar: bool = True, logger: bool = True) -> None:
        self.prog_bar, self.logger = prog_bar, logger

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a trainer with nothing to watch."""
        watched = (SampleCollector, EffectiveTemperature, EnsembleEvaluation)
        if not any(isinstance(callback, watched) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise RuntimeError(
                "SamplingProgress has nothing to show: add a SampleCollector, EffectiveTemperature or "
                "EnsembleEvaluation to the trainer's callbacks."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is known."""
        if trainer.barebones:
            return
        for name, value in self.values(trainer).items():
            pl_module.log(
                name, value, prog_bar=self.prog_bar, logger=self.logger, on_step=True, on_epoch=False, batch_size=1
            )

    def values(self, trainer: pl.Trainer) -> dict[str, float]:
        """What there is to say now, by name."""
        found: dict[str, float] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SampleCollector):
                found["samples"] = found.get("samples", 0.0) + callback.collected
                cycle = None if callback.schedule is None else callback.schedule.cycle(trainer.global_step)
                if cycle is not None:
                    found["cycle"] = float(cycle)
            elif isinstance(callback, EffectiveTemperature) and "effective_temperature" in callback.table.get(
                "overall", {}
            ):
                found["T_eff"] = callback.table["overall"]["effective_temperature"]
            elif isinstance(callback, EnsembleEvaluation) and "ensemble/nll" in callback.scores:
                found["ensemble_nll"] = callback.scores["ensemble/nll"]
        return found
