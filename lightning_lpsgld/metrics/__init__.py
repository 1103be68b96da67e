"""Scores of class probabilities that torchmetrics lacks: likelihood, Brier score, calibration."""

from lightning_lpsgld.metrics.functional import (
    ReliabilityBins,
    bin_sums,
    brier_score,
    calibration_error,
    categorical_nll,
    entropy,
    reliability_bins,
)
from lightning_lpsgld.metrics.modular import BrierScore, CalibrationError, CategoricalNLL

__all__ = [
    "BrierScore",
    "CalibrationError",
    "CategoricalNLL",
    "ReliabilityBins",
    "bin_sums",
    "brier_score",
    "calibration_error",
    "categorical_nll",
    "entropy",
    "reliability_bins",
]
