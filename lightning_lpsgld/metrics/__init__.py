"""Scores that torchmetrics lacks: likelihood, Brier, calibration, selective risk; mixtures of Gaussians; diversity."""

from lightning_lpsgld.metrics.base import MeanScore, Score
from lightning_lpsgld.metrics.classwise import ClasswiseCalibrationError, classwise_calibration_error
from lightning_lpsgld.metrics.diversity import (
    Ambiguity,
    Disagreement,
    ambiguity_terms,
    disagreement_terms,
    votes_of,
)
from lightning_lpsgld.metrics.functional import (
    ReliabilityBins,
    bin_sums,
    brier_score,
    calibration_error,
    categorical_nll,
    entropy,
    reliability_bins,
)
from lightning_lpsgld.metrics.mixture import (
    MixturePoints,
    gaussian_spread,
    mixture_cdf,
    mixture_crps,
    mixture_log_density,
    mixture_points,
    mixture_quantile,
)
from lightning_lpsgld.metrics.modular import Accuracy, BrierScore, CalibrationError, CategoricalNLL
from lightning_lpsgld.metrics.ranking import (
    AURC,
    AdaptiveCalibrationError,
    CoverageAtRisk,
    adaptive_calibration_error,
    area_under_risk_coverage,
    coverage_at_risk,
    risk_coverage,
)
from lightning_lpsgld.metrics.regression import (
    AleatoricVariance,
    EpistemicVariance,
    IntervalCoverage,
    IntervalWidth,
    MixtureCRPS,
    MixtureNLL,
    MixtureRMSE,
    MixtureScore,
    QuantileCalibration,
)
from lightning_lpsgld.metrics.temperature import CalibratedNLL, calibrated_nll

__all__ = [
    "AURC",
    "Accuracy",
    "AdaptiveCalibrationError",
    "AleatoricVariance",
    "Ambiguity",
    "BrierScore",
    "CalibratedNLL",
    "CalibrationError",
    "CategoricalNLL",
    "ClasswiseCalibrationError",
    "CoverageAtRisk",
    "Disagreement",
    "EpistemicVariance",
    "IntervalCoverage",
    "IntervalWidth",
    "MeanScore",
    "MixtureCRPS",
    "MixtureNLL",
    "MixturePoints",
    "MixtureRMSE",
    "MixtureScore",
    "QuantileCalibration",
    "ReliabilityBins",
    "Score",
    "adaptive_calibration_error",
    "ambiguity_terms",
    "area_under_risk_coverage",
    "bin_sums",
    "brier_score",
    "calibrated_nll",
    "calibration_error",
    "categorical_nll",
    "classwise_calibration_error",
    "coverage_at_risk",
    "disagreement_terms",
    "entropy",
    "gaussian_spread",
    "mixture_cdf",
    "mixture_crps",
    "mixture_log_density",
    "mixture_points",
    "mixture_quantile",
    "reliability_bins",
    "risk_coverage",
    "votes_of",
]
