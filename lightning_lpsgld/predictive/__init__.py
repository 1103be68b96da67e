"""Predictions from a bank of samples: Bayesian model average, its uncertainties, BatchNorm refresh."""

from lightning_lpsgld.predictive.average import (
    EnsembleResult,
    SampleResult,
    SampleSource,
    bayesian_model_average,
    default_metrics,
)
from lightning_lpsgld.predictive.batch_norm import refresh_batch_norm
from lightning_lpsgld.predictive.batches import default_inputs, default_logits, default_targets
from lightning_lpsgld.predictive.conformal import class_scores, conformal_quantile, interval_scores, prediction_sets
from lightning_lpsgld.predictive.ensemble import PosteriorPredictive, probabilities_of
from lightning_lpsgld.predictive.posterior import PosteriorEnsemble
from lightning_lpsgld.predictive.prediction import ClassPrediction, Prediction, RegressionPrediction
from lightning_lpsgld.predictive.probes import chain_draws, weight_probes
from lightning_lpsgld.predictive.swap import swapped_weights

__all__ = [
    "ClassPrediction",
    "EnsembleResult",
    "PosteriorEnsemble",
    "PosteriorPredictive",
    "Prediction",
    "RegressionPrediction",
    "SampleResult",
    "SampleSource",
    "bayesian_model_average",
    "chain_draws",
    "class_scores",
    "conformal_quantile",
    "default_inputs",
    "default_logits",
    "default_metrics",
    "default_targets",
    "interval_scores",
    "prediction_sets",
    "probabilities_of",
    "refresh_batch_norm",
    "swapped_weights",
    "weight_probes",
]
