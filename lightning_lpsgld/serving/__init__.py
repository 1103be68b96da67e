"""Predictions through a Lightning Trainer: the ensemble as a LightningModule, and a writer to Parquet and CSV."""

from lightning_lpsgld.serving.module import PosteriorModule
from lightning_lpsgld.serving.table import prediction_columns
from lightning_lpsgld.serving.writer import PredictionWriter

__all__ = ["PosteriorModule", "PredictionWriter", "prediction_columns"]
