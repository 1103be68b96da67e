"""Predictions on disk, batch by batch."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_lpsgld.predictive.batches import default_targets
from lightning_lpsgld.serving.table import prediction_columns

__all__ = ["PredictionWriter"]

Columns = dict[str, list[Any]]


class _Table(Protocol):
    def write(self, columns: Columns) -> None: ...
    def close(self) -> None: ...


class _Csv:
    def __init__(self, path: Path) -> None:
        self.file = path.open("w", newline="", encoding="utf-8")
        self.names: list[str] | None = None

    def write(self, columns: Columns) -> None:
        writer = csv.writer(self.file)
        if self.names is None:
            self.names = list(columns)
            writer.writerow(self.names)
        writer.writerows(zip(*columns.values()))

    def close(self) -> None:
        self.file.close()


class _Parquet:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer: Any = None

    def write(self, columns: Columns) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(columns)
        if self.writer is None:
            self.writer = pyarrow.parquet.ParquetWriter(self.path, table.schema)
        self.writer.write_table(table)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class PredictionWriter(BasePredictionWriter):
    """Write what ``trainer.predict`` predicts to a Parquet or CSV file, one row a point.

    Columns: ``dataloader`` and ``index`` (number in the dataset, where Lightning knows it, else in the order of the
    loader), ``target`` where batches have one a point, then those of :func:`.prediction_columns`. Rows are written
    batch by batch under a temporary name; the file gets its name when the run is complete. Of several ranks each
    writes its own file, ``name.rank1.csv`` and so on. With
    ``trainer.predict(..., return_predictions=False)`` nothing is kept in memory.

    Args:
        path: Ends in ``.parquet`` (needs pyarrow: extra ``predict``) or ``.csv``. A file that is there is replaced.

    Raises:
        ValueError: If it ends otherwise.
        ModuleNotFoundError: If Parquet is asked for and pyarrow is missing.

    Example:
        >>> PredictionWriter("predictions.txt")
        Traceback (most recent call last):
        ValueError: PredictionWriter: `path` must end in .parquet or .csv, got 'predictions.txt'.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)
        if self.path.suffix not in (".parquet", ".csv"):
            raise ValueError(f"PredictionWriter: `path` must end in .parquet or .csv, got {os.fspath(path)!r}.")
        if self.path.suffix == ".parquet":
            _require_pyarrow()
        self._table: _Table | None = None
        self._counts: dict[int, int] = {}
        self._names: list[str] | None = None

    @property
    def _partial(self) -> Path:
        return self._final.with_name(self._final.name + ".partial")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose this rank's file."""
        super().setup(trainer, pl_module, stage)
        rank = "" if trainer.world_size == 1 else f".rank{trainer.global_rank}"
        self._final = self.path.with_name(f"{self.path.stem}{rank}{self.path.suffix}")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file."""
        self._final.parent.mkdir(parents=True, exist_ok=True)
        self._counts, self._names = {}, None
        self._table = _Parquet(self._partial) if self.path.suffix == ".parquet" else _Csv(self._partial)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the rows of a batch."""
        assert self._table is not None
        columns = prediction_columns(prediction)
        count = len(next(iter(columns.values())))
        first = self._counts.get(dataloader_idx, 0)
        self._counts[dataloader_idx] = first + count
        known = batch_indices is not None and len(batch_indices) == count
        index = list(batch_indices) if known and batch_indices is not None else list(range(first, first + count))
        head: Columns = {"dataloader": [dataloader_idx] * count, "index": index}
        target = default_targets(batch)
        if isinstance(target, Tensor) and target.ndim == 1 and len(target) == count:
            head["target"] = target.tolist()
        columns = head | columns
        if self._names is not None and self._names != list(columns):
            raise ValueError(
                f"PredictionWriter: batch {batch_idx} of dataloader {dataloader_idx} has other columns than the first; "
                "write loaders of different kinds to different files."
            )
        self._names = list(columns)
        self._table.write(columns)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the file and give it its name."""
        if self._table is None:
            return
        self._table.close()
        self._table = None
        if self._partial.exists():
            os.replace(self._partial, self._final)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close and remove what is not complete."""
        if self._table is not None:
            self._table.close()
            self._table = None
            self._partial.unlink(missing_ok=True)


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            'PredictionWriter: .parquet needs pyarrow: pip install "lightning_lpsgld[predict]", or write a .csv.'
        ) from error
