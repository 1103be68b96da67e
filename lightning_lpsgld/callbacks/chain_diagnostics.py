"""Logs whether chains have converged, while they run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_lpsgld.analysis.diagnostics import ChainDiagnostic, chain_diagnostics, to_inference_data
from lightning_lpsgld.callbacks.collector import SampleCollector
from lightning_lpsgld.predictive.probes import chain_draws

__all__ = ["ChainDiagnostics"]


class ChainDiagnostics(Callback):
    """Log split R-hat and effective sample size of what a :class:`SampleCollector` has gathered.

    After each validation and at the end of the fit, rank zero computes them over the collected samples for the norm of
    the weights, random projections of them, and what ``measure`` gives; it logs ``chains/rhat`` (the largest),
    ``chains/ess_bulk`` and ``chains/ess_tail`` (the smallest). Each sample is read once. With one chain its halves are
    compared.

    Args:
        measure: Maps the module, holding a sample, to further quantities by name, e.g. held-out loss or logits.
        projections: Number of random projections of the weights.
        seed: Seed of the projections.

    Attributes:
        results: The last :class:`~lightning_lpsgld.analysis.ChainDiagnostic` of every quantity, by name; on rank zero.
        draws: The quantities, ``(chains, draws)``, by name; on rank zero.

    Raises:
        RuntimeError: When a fit starts, if the Trainer has no :class:`SampleCollector`.
        ModuleNotFoundError: When a fit starts, if arviz-stats is not installed.

    Example:
        >>> ChainDiagnostics(projections=2).results
        {}
    """

    def __init__(
        self, measure: Callable[[nn.Module], Mapping[str, float]] | None = None, *, projections: int = 4, seed: int = 0
    ) -> None:
        self.measure, self.projections, self.seed = measure, projections, seed
        self.results: dict[str, ChainDiagnostic] = {}
        self.draws: dict[str, Tensor] = {}
        self._cache: dict[tuple[int, int], dict[str, float]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a run without collector, or without arviz-stats."""
        if stage == "fit":
            _collector(trainer)
            chain_diagnostics({})
            self._cache.clear()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute and log, within a fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._report(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute and log for the last time."""
        self._report(trainer, pl_module)
        if trainer.is_global_zero and not self.results:
            rank_zero_warn("ChainDiagnostics: fewer than 4 samples per chain were collected; nothing to compare.")

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        bank = _collector(trainer).bank
        counts = [sum(info.chain == chain for info in bank.infos) for chain in bank.chains]
        if not counts or min(counts) < 4:
            return
        module = None if self.measure is None else copy.deepcopy(pl_module)
        self.draws = chain_draws(
            bank, module=module, measure=self.measure, projections=self.projections, seed=self.seed, cache=self._cache
        )
        self.results = chain_diagnostics(self.draws)
        summary = {f"chains/{name}": value for name, value in summarize(self.results).items()}
        for logger in trainer.loggers:
            logger.log_metrics(summary, step=trainer.global_step)

    def inference_data(self) -> Any:
        """What was computed last, as ArviZ holds it; see :func:`~lightning_lpsgld.analysis.to_inference_data`."""
        return to_inference_data(self.draws)


def summarize(results: Mapping[str, ChainDiagnostic]) -> dict[str, float]:
    """The worst value of each diagnostic; constant quantities do not count."""
    rows = [row for row in results.values() if not math.isnan(row.rhat)]
    if not rows:
        return {}
    return {
        "rhat": max(row.rhat for row in rows),
        "ess_bulk": min(row.ess_bulk for row in rows),
        "ess_tail": min(row.ess_tail for row in rows),
    }


def _collector(trainer: pl.Trainer) -> SampleCollector:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SampleCollector):
            return callback
    raise RuntimeError("ChainDiagnostics needs a SampleCollector among the Trainer's callbacks, to have samples.")
