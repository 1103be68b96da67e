"""Probabilities where logits are expected, and logits where probabilities are: a clear error, from every door."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.models import Classifier, SyntheticData, make_trainer
from torch import nn

from lightning_lpsgld import LowPrecisionSGLD, metrics
from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.callbacks import EnsembleEvaluation, SampleCollector
from lightning_lpsgld.metrics.simplex import rows_of_probabilities
from lightning_lpsgld.predictive import (
    Binary,
    PosteriorEnsemble,
    PosteriorPredictive,
    bayesian_model_average,
    probabilities_of,
)

LOGITS = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(64) % 3
SCORES = [
    metrics.Accuracy, metrics.CategoricalNLL, metrics.BrierScore, metrics.CalibrationError, metrics.CalibratedNLL,
    metrics.ClasswiseCalibrationError, metrics.AdaptiveCalibrationError, metrics.AURC,
]  # fmt: skip
FUNCTIONS = [
    metrics.categorical_nll, metrics.brier_score, metrics.calibration_error, metrics.calibrated_nll,
    metrics.classwise_calibration_error, metrics.adaptive_calibration_error, metrics.area_under_risk_coverage,
]  # fmt: skip


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
def test_every_metric_refuses_logits(score):
    metric = score(3) if score is metrics.ClasswiseCalibrationError else score()
    metric.update(LOGITS.softmax(1), TARGETS)
    with pytest.raises(ValueError, match=r"sum to 1, got a row .*logits\? Pass logits.softmax\(dim=1\)"):
        metric.update(LOGITS, TARGETS)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_refuses_logits(function):
    function(LOGITS.softmax(1), TARGETS)
    for wrong in (LOGITS, LOGITS.abs(), LOGITS.log_softmax(1)):
        with pytest.raises(ValueError, match="logits"):
            function(wrong, TARGETS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounded_probabilities_are_probabilities(dtype):
    """Of a thousand classes, rounded to 8 bits of mantissa; and a row of NaN is no row of logits."""
    wide = torch.randn(16, 1000, generator=torch.Generator().manual_seed(2)).softmax(1).to(dtype)
    metrics.categorical_nll(wide, torch.zeros(16, dtype=torch.long))
    broken = LOGITS.softmax(1)
    broken[3] = torch.nan
    assert metrics.categorical_nll(broken, TARGETS).isnan()


def test_the_running_predictive_refuses_logits():
    with pytest.raises(ValueError, match="logits"):
        PosteriorPredictive().update(0, LOGITS, TARGETS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_second_softmax_is_refused(dtype):
    with pytest.raises(ValueError, match=r"Logits are expected, got probabilities: all 64 rows.*\.log\(\)"):
        probabilities_of(LOGITS.softmax(1).to(dtype))
    assert not rows_of_probabilities(LOGITS.softmax(1)[:3])  # too few to be sure
    torch.testing.assert_close(probabilities_of(LOGITS.log_softmax(1)), LOGITS.softmax(1))


class Softmaxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).softmax(1)


def test_the_model_average_and_the_ensemble_refuse_probabilities():
    net, bank = Softmaxed(), SampleBank()
    bank.add(net, step=0)
    x = torch.randn(32, 4)
    with pytest.raises(ValueError, match="Logits are expected, got probabilities"):
        bayesian_model_average(bank, net, [(x, torch.arange(32) % 3)])
    bayesian_model_average(bank, net, [(x, torch.arange(32) % 3)], logits=lambda module, batch: module(batch[0]).log())
    with pytest.raises(ValueError, match="Logits are expected, got probabilities"):
        PosteriorEnsemble.from_bank(net, bank).predict_proba(x)


@pytest.mark.filterwarnings("ignore")
def test_the_evaluation_in_the_trainer_refuses_probabilities():
    class Module(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.nll_loss(self(batch[0]).log(), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(1))
    plugin = LowPrecisionSGLD(seed=1)
    trainer = make_trainer(plugins=[plugin], callbacks=[SampleCollector(every=4), EnsembleEvaluation()])
    with pytest.raises(ValueError, match="Logits are expected, got probabilities"):
        trainer.fit(Module(net), SyntheticData())


def test_one_logit_a_point_that_looks_like_a_sigmoid_is_warned_of():
    """No error: logits of single points can lie in [0, 1]."""
    logits, targets = LOGITS[:, 0], (TARGETS > 0).long()
    with pytest.warns(UserWarning, match=r"task='binary' expects logits, and all 64 of this batch lie in \[0, 1\]"):
        Binary().read(logits.sigmoid(), targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Binary().read(logits, targets)
        Binary().read(logits[:8].sigmoid(), targets[:8])
