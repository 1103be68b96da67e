"""Averages that grow: within a fit, a validation runs only the samples that came since the last one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from lightning_lpsgld.bank import SampleBank, SampleInfo
from lightning_lpsgld.predictive import (
    ChangedBatchesError,
    EnsembleResult,
    RunningPredictive,
    SampleResult,
    SampleSource,
    TaskReader,
)

__all__ = ["CurrentWeights", "Selection", "Watch"]


class Selection:
    """At most ``limit`` samples of a bank, evenly spaced, the newest included; what a Bayesian model average reads."""

    def __init__(self, bank: SampleBank, limit: int | None) -> None:
        n, k = len(bank), len(bank) if limit is None else min(limit, len(bank))
        self.bank = bank
        self.indices = [n - 1 - (i * n) // k for i in reversed(range(k))] if k else []

    @property
    def infos(self) -> list[SampleInfo]:
        """Metadata of the samples."""
        infos = self.bank.infos
        return [infos[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def point(self, result: SampleResult, size: int, loader_index: int) -> dict[str, Any]:
        """Scores of a sample, and of the ensemble of the first ``size``, as a row of a curve."""
        point: dict[str, Any] = {
            "dataloader_idx": loader_index,
            "index": self.indices[result.index],
            "size": size,
            "step": result.info.step,
            "chain": result.info.chain,
        }
        point |= {f"sample/{name}": value for name, value in result.sample.items()}
        return point | {f"ensemble/{name}": value for name, value in result.ensemble.items()}

    def load_into(self, module: torch.nn.Module, index: int) -> None:
        """Write sample ``index`` of the selection into a module."""
        self.bank.load_into(module, self.indices[index])

    def from_number(self, start: int) -> Selection:
        """The samples from number ``start`` on."""
        rest = Selection(self.bank, 0)
        rest.indices = self.indices[start:]
        return rest


class CurrentWeights:
    """A source of one sample: the weights that a module has."""

    def __init__(self, step: int) -> None:
        self.infos = [SampleInfo(step)]

    def __len__(self) -> int:
        return 1

    def load_into(self, module: torch.nn.Module, index: int) -> None:
        """Nothing is to be loaded."""


class Watch:
    """What one dataloader's predictions have added up to so far.

    Sums per point are kept while the samples that made them are the first ones of the bank; else, and where batches
    turn out to be others, they are made anew.

    Args:
        loader: The dataloader.
        limit: Most batches taken from it.
        reader: How its predictions are read.
    """

    def __init__(self, loader: Any, limit: float, reader: TaskReader) -> None:
        self.loader, self.limit, self.reader = loader, limit, reader
        #: Of torch's generator at the start of every pass: a loader that shuffles gives the same order each time.
        self.generator_state = torch.get_rng_state()
        self._running: RunningPredictive | None = None
        self._history: list[SampleResult] = []

    def extend(
        self, bank: Selection, average: Callable[[SampleSource, RunningPredictive | None], EnsembleResult]
    ) -> EnsembleResult:
        """Average over all samples of ``bank``, of which those that are in the sums already are not run again.

        Args:
            bank: The samples, at least one.
            average: Called as ``average(samples, sums)``.

        Returns:
            Sums and history of the whole bank.
        """
        done, running = self._history, self._running
        self._history, self._running = [], None  # what an exception leaves half done is not used again
        if running is None or [result.info for result in done] != bank.infos[: len(done)]:
            done, running = [], None
        try:
            result = self._average(bank, done, running, average)
        except ChangedBatchesError:
            if running is None:
                raise
            result = self._average(bank, [], None, average)
        self._history, self._running = result.history, result.predictive
        return result

    def _average(
        self,
        bank: Selection,
        done: list[SampleResult],
        running: RunningPredictive | None,
        average: Callable[[SampleSource, RunningPredictive | None], EnsembleResult],
    ) -> EnsembleResult:
        start = len(done)
        if running is not None and start == len(bank):
            assert self.reader.task is not None
            return EnsembleResult(running, done, self.reader.task)
        result = average(bank.from_number(start), running)
        new = [dataclasses.replace(sample, index=sample.index + start) for sample in result.history]
        return EnsembleResult(result.predictive, [*done, *new], result.task)
