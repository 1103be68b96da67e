"""Logging of a table of quantities, overall and per parameter, that a monitor has measured."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl

__all__ = ["log_table"]


def log_table(
    trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str, table: Mapping[str, Mapping[str, float]]
) -> None:
    """Log ``prefix/quantity`` for the row ``"overall"`` and ``prefix/quantity/name`` for every other row.

    The overall values also reach monitoring callbacks. Loggers are served directly, because Lightning would drop what
    is logged on a step that is not a multiple of ``log_every_n_steps``.

    Args:
        trainer: A trainer that fits.
        pl_module: Its module.
        prefix: First part of every key.
        table: Row name -> quantity -> value.
    """
    total = {f"{prefix}/{quantity}": value for quantity, value in table["overall"].items()}
    pl_module.log_dict(total, on_step=True, on_epoch=False, logger=False, batch_size=1)
    layers = {
        f"{prefix}/{quantity}/{name}": value
        for name, values in table.items()
        if name != "overall"
        for quantity, value in values.items()
    }
    for logger in trainer.loggers:
        logger.log_metrics(total | layers, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
