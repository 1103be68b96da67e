"""Predictions from a bank of samples: Bayesian model average, its uncertainties, BatchNorm refresh."""

from lightning_lpsgld.predictive.average import (
    EnsembleResult,
    NonFinitePredictionError,
    SampleResult,
    SampleSource,
    bayesian_model_average,
)
from lightning_lpsgld.predictive.batch_norm import refresh_batch_norm
from lightning_lpsgld.predictive.batches import default_inputs, default_logits, default_targets
from lightning_lpsgld.predictive.conformal import class_scores, conformal_quantile, interval_scores, prediction_sets
from lightning_lpsgld.predictive.ensemble import PosteriorPredictive, probabilities_of
from lightning_lpsgld.predictive.integers import layer_arithmetic
from lightning_lpsgld.predictive.learning_coefficient import LearningCoefficient, LocalLearningCoefficient
from lightning_lpsgld.predictive.mixtures import MixturePredictive
from lightning_lpsgld.predictive.outputs import GaussianOutput, read_output
from lightning_lpsgld.predictive.posterior import PosteriorEnsemble
from lightning_lpsgld.predictive.prediction import ClassPrediction, Prediction, RegressionPrediction
from lightning_lpsgld.predictive.probes import chain_draws, weight_probes
from lightning_lpsgld.predictive.reading import TaskName, TaskReader, decide_task
from lightning_lpsgld.predictive.running import ChangedBatchesError, RunningPredictive
from lightning_lpsgld.predictive.scoring import default_metrics, further_scores, regression_metrics
from lightning_lpsgld.predictive.swap import swapped_weights
from lightning_lpsgld.predictive.tasks import Binary, Multiclass, Multilabel, Regression, Task
from lightning_lpsgld.predictive.verdict import diversity_verdict

__all__ = [
    "Binary",
    "ChangedBatchesError",
    "ClassPrediction",
    "EnsembleResult",
    "GaussianOutput",
    "LearningCoefficient",
    "LocalLearningCoefficient",
    "MixturePredictive",
    "Multiclass",
    "Multilabel",
    "NonFinitePredictionError",
    "PosteriorEnsemble",
    "PosteriorPredictive",
    "Prediction",
    "Regression",
    "RegressionPrediction",
    "RunningPredictive",
    "SampleResult",
    "SampleSource",
    "Task",
    "TaskName",
    "TaskReader",
    "bayesian_model_average",
    "chain_draws",
    "class_scores",
    "conformal_quantile",
    "decide_task",
    "default_inputs",
    "default_logits",
    "default_metrics",
    "default_targets",
    "diversity_verdict",
    "further_scores",
    "interval_scores",
    "layer_arithmetic",
    "prediction_sets",
    "probabilities_of",
    "read_output",
    "refresh_batch_norm",
    "regression_metrics",
    "swapped_weights",
    "weight_probes",
]
