"""Microscaled weights, gradients, activations and errors in a Trainer, with samples, meter and ensemble."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.models import RecordingLogger, SyntheticData, make_trainer, small_mlp

from lightning_lpsgld import (
    EffectiveTemperature,
    EnsembleEvaluation,
    GradientShrinkage,
    LowPrecisionSGLD,
    SampleBank,
    SampleCollector,
)
from lightning_lpsgld.ops import quantize


@pytest.mark.parametrize("name", ["mxfp8e4m3", "mxfp8e4m3-fit"])
def test_a_trainer_run_from_weights_to_ensemble(name, tmp_path):
    """Weights stay on the grid and learn; the bank's samples are them; meter and card know the format."""
    module, data, logger = small_mlp(lr=0.2), SyntheticData(n_train=96, shuffle=False), RecordingLogger()
    plugin = LowPrecisionSGLD(
        weights=name, gradients="mxfp8e5m2", activations="mxfp8e4m3", errors="mxfp8e5m2", temperature=1e-3, seed=5
    )
    collector = SampleCollector(tmp_path / "bank", start=24, every=12)
    watchers = [EffectiveTemperature(every_n_steps=4), GradientShrinkage(every_n_steps=4), EnsembleEvaluation()]
    options = {"max_epochs": 5, "log_every_n_steps": 1, "logger": logger}
    trainer = make_trainer(plugins=[plugin], callbacks=[collector, *watchers], **options)
    trainer.fit(module, data)
    (tested,) = trainer.test(module, data, verbose=False)
    for param in module.parameters():
        assert torch.equal(quantize(param.detach(), name, rounding="nearest"), param)
    losses = [row["train_loss"] for _, row in logger.rows if "train_loss" in row]
    assert sum(losses[-12:]) < sum(losses[:12]), "mean over the last epoch and the first"
    assert tested["ensemble/accuracy"] > 1 / 2, "three classes, well apart"
    assert plugin.card.formats["weights"] == name
    assert plugin.card.weight_bytes == sum(p.numel() + math.prod((*p.shape[:-1], 1)) for p in module.parameters())
    bank = SampleBank.open(tmp_path / "bank")
    assert len(bank) >= 3
    other = small_mlp(seed=9)
    bank.load_into(other, len(bank) - 1)
    assert all(torch.equal(quantize(p.detach(), name, rounding="nearest"), p) for p in other.parameters())
