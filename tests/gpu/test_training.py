"""The Trainer on the device: samplers at their defaults, bank, resume, meter, late check, bf16, compile, integers."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.loaders import ResumableLoader
from helpers.models import Classifier, SyntheticData, make_trainer, synthetic_classes
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_lpsgld import EffectiveTemperature, EnsembleEvaluation, LowPrecisionSGLD, SampleBank, SampleCollector
from lightning_lpsgld.bank import BankError
from lightning_lpsgld.ops import quantize, self_check
from lightning_lpsgld.predictive import bayesian_model_average
from lightning_lpsgld.samplers import HALP, SGHMC

ROWS = {
    "SGLD": {},
    "SGLD full": {"accumulator": "full"},
    "SGLD fixed": {"weights": "fixed8.6", "gradients": "fixed8.6", "activations": "fixed8.5", "errors": "fixed8.7"},
    "SGLD mx": {"weights": "mxfp8e4m3", "gradients": "mxfp8e4m3", "activations": "mxfp8e4m3", "errors": "mxfp8e5m2"},
    "SGLD codes": {"saved_activations": "codes"},
    "SGLD four bits": {"saved_activations": "codes", "storage": "codes", "weights": "bfp4", "accumulator": "bfp16"},
    "SGHMC": {"sampler": partial(SGHMC, friction=2.0, velocity_format="bfp8")},
    "SGHMC full": {"sampler": partial(SGHMC, friction=2.0), "accumulator": "full"},
    "HALP": {"sampler": partial(HALP, mu=2.0)},
}


def net(seed: int = 0) -> Classifier:
    """Convolutions with and without padding, batch norm, a linear layer; 32 inputs to it, for microscaling."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
        return Classifier(nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)), lr=0.05)


def data(**options) -> SyntheticData:
    return SyntheticData(n_train=64, n_eval=40, batch_size=16, shape=(1, 6, 6), **options)


def fit(accelerator: str, *callbacks: Callback, module=None, source=None, steps: int = 8, ckpt=None, **plugin):
    module = net() if module is None else module
    trainer = make_trainer(
        accelerator=accelerator, max_epochs=-1, max_steps=steps, callbacks=list(callbacks), limit_val_batches=0,
        plugins=[LowPrecisionSGLD(**{"seed": 1, **plugin})],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    trainer.fit(module, data(shuffle=False) if source is None else source, ckpt_path=ckpt)
    return module, trainer


class OnDevice(Callback):
    """Device types of weights and batches while training."""

    def __init__(self) -> None:
        self.types: set[str] = set()

    def on_train_batch_end(self, trainer, module, outputs, batch, *rest) -> None:
        self.types |= {batch[0].device.type, *(p.device.type for p in module.parameters())}


@pytest.mark.parametrize("row", ROWS)
def test_every_sampler_at_its_defaults_fills_a_bank(row: str, accelerator: str, device: str, tmp_path) -> None:
    seen = OnDevice()
    collector = SampleCollector(tmp_path / "bank", every=2)
    module, trainer = fit(accelerator, seen, collector, **ROWS[row])
    assert seen.types == {device}
    assert trainer.global_step == 8
    assert all(p.isfinite().all() for p in module.parameters())
    bank = SampleBank.open(tmp_path / "bank")
    assert len(bank) == 4
    weights = ROWS[row].get("weights", "bfp8")
    bank.load_into(fresh := net(seed=9), 3)
    last = fresh.net[0].weight.detach()
    if row != "HALP":  # whose weights are a float centre and offsets
        assert torch.equal(quantize(last, weights, rounding="nearest"), last)
    assert trainer.precision_plugin.card is not None
    result = bayesian_model_average(bank, module.to(device), data().test_dataloader())
    assert result.predictive.probabilities.shape == (40, 3)
    assert self_check.failures() == []


@pytest.mark.parametrize("row", ROWS)
def test_a_run_on_the_device_is_the_same_again_and_near_the_cpus(row: str, accelerator: str) -> None:
    """Bit for bit itself; on a CPU sums are added in another order, which rounding may amplify: only roughly that."""
    first, again = (fit(accelerator, steps=4, **ROWS[row])[0] for _ in range(2))
    own = [torch.equal(a, b) for a, b in zip(first.cpu().state_dict().values(), again.cpu().state_dict().values())]
    assert all(own)
    there = fit("cpu", steps=4, **ROWS[row])[0]
    for (name, a), b in zip(first.named_parameters(), there.parameters()):
        assert (a - b).norm() <= 0.25 * b.norm() + 0.05, name


@pytest.mark.parametrize("row", ["SGLD", "SGLD full", "SGHMC", "SGHMC full", "HALP"])
def test_resumed_is_uninterrupted(row: str, accelerator: str, tmp_path) -> None:
    def loader() -> Any:
        images = synthetic_classes(64, (1, 6, 6), 3, seed=0)
        return DataLoader(images, 16) if row == "HALP" else ResumableLoader(images, 16)  # HALP wants the former

    whole, _ = fit(accelerator, source=loader(), steps=8, **ROWS[row])
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(accelerator, saver, source=loader(), steps=4, **ROWS[row])
    resumed, trainer = fit(accelerator, source=loader(), steps=8, ckpt=tmp_path / "step=4.ckpt", **ROWS[row])
    assert trainer.global_step == 8
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a.cpu(), b.cpu()), name


def test_meter_and_evaluation(accelerator: str, tmp_path) -> None:
    collector, meter = SampleCollector(tmp_path / "bank", every=2), EffectiveTemperature(every_n_steps=2, verdict=False)
    module, trainer = fit(accelerator, collector, meter)
    assert trainer.callback_metrics["noise/achieved_over_target"].isfinite()
    tester = make_trainer(
        accelerator=accelerator, plugins=[LowPrecisionSGLD(seed=1)], callbacks=[EnsembleEvaluation(tmp_path / "bank")]
    )
    scores = tester.test(module, data(), verbose=False)[0]
    on_cpu = make_trainer(
        plugins=[LowPrecisionSGLD(seed=1)], callbacks=[EnsembleEvaluation(tmp_path / "bank", arithmetic="simulated")]
    ).test(module, data(), verbose=False)[0]
    assert scores["ensemble/size"] == 4
    assert abs(scores["ensemble/nll"] - on_cpu["ensemble/nll"]) < 1e-2
    assert {k for k in scores if k.startswith("ensemble/")} == {k for k in on_cpu if k.startswith("ensemble/")}


class Breaks(Callback):
    """A NaN in a gradient at one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer, module) -> None:
        if trainer.global_step == self.step:
            module.net[0].weight.grad[0, 0] = float("nan")


@pytest.mark.parametrize("step", [3, 7])
def test_no_checkpoint_and_no_sample_holds_a_nan(step: int, accelerator: str, cuda: str, tmp_path) -> None:
    """The check is read one step late there, but before anything keeps the weights; 7 is the last step."""
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(FloatingPointError, match=rf"net\.0\.weight is NaN or infinite at step {step}.*hold it now"):
        fit(accelerator, Breaks(step), saver, SampleCollector(tmp_path / "bank", every=1))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == step
    for file in files:
        weights = torch.load(file, weights_only=False, map_location="cpu")["state_dict"]
        assert all(value.isfinite().all() for value in weights.values()), file
    bank = SampleBank.open(tmp_path / "bank")
    assert bank.steps == list(range(1, step + 1))
    assert all(t.isfinite().all() for sample in bank for t in sample.tensors.values())


@pytest.mark.parametrize("step", [3, 7])
def test_without_anything_to_save_the_run_still_does_not_end_well(step: int, accelerator: str) -> None:
    with pytest.raises(FloatingPointError, match=f"at step {step}"):
        fit(accelerator, Breaks(step))


def test_bfloat16_compute(accelerator: str, tmp_path) -> None:
    module, _ = fit(accelerator, SampleCollector(tmp_path / "bank", every=4), compute="bf16-mixed")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
    assert len(SampleBank.open(tmp_path / "bank")) == 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_uncompiled(backend: str, accelerator: str, cuda: str) -> None:
    """The casts are nodes of the graph. With ``aot_eager`` nothing else changes; inductor's own sums may differ."""
    torch._dynamo.reset()
    plain, _ = fit(accelerator, steps=4)
    module = net()
    module.net.compile(backend=backend)
    compiled, _ = fit(accelerator, module=module, steps=4)
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters()):
        if backend == "aot_eager":
            assert torch.equal(a, b), name
        assert (a - b).norm() <= 0.25 * b.norm() + 0.05, name


@pytest.mark.parametrize("arithmetic", ["auto", "integer"])
def test_arithmetic_of_training_and_prediction(arithmetic: str, accelerator: str, device: str, tmp_path) -> None:
    """What runs in integers there is exact, so sums differ from simulated ones in their last bits only."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)]
    module = Classifier(nn.Sequential(*layers), lr=0.05)
    collector = SampleCollector(tmp_path / "bank", every=4)
    module, trainer = fit(accelerator, collector, module=module, arithmetic=arithmetic)
    assert all(p.isfinite().all() for p in module.parameters())

    def scores(choice: str) -> dict[str, float]:
        callbacks = [EnsembleEvaluation(tmp_path / "bank", arithmetic=choice)]
        options = {"accelerator": accelerator, "plugins": [LowPrecisionSGLD(seed=1)], "callbacks": callbacks}
        found: dict[str, float] = make_trainer(**options).test(module, data(), verbose=False)[0]
        return found

    ours, theirs = scores(arithmetic), scores("simulated")
    assert abs(ours["ensemble/nll"] - theirs["ensemble/nll"]) < 1e-2
    assert isinstance(trainer, pl.Trainer)


def test_a_bank_made_on_the_device_is_read_on_the_cpu(accelerator: str, tmp_path) -> None:
    module, _ = fit(accelerator, SampleCollector(tmp_path / "bank", every=4))
    fresh = net(seed=9)
    bank = SampleBank.open(tmp_path / "bank")
    bank.load_into(fresh, len(bank) - 1)
    for (name, a), b in zip(module.named_parameters(), fresh.parameters()):
        assert torch.equal(a.cpu(), b), name
    with pytest.raises(BankError):
        bank.load_into(nn.Linear(3, 3), 0)


@pytest.mark.parametrize("base", ["stored", "reference"])
def test_frozen_weights_stand_once_in_the_bank(base: str, accelerator: str, tmp_path) -> None:
    """They are compared where they lie, and loaded into a module on either side."""
    module = net()
    module.net[0].requires_grad_(False)
    frozen = module.net[0].weight.detach().cpu().clone()
    fit(accelerator, SampleCollector(tmp_path / "bank", every=2, base=base), module=module)
    bank = SampleBank.open(tmp_path / "bank")
    assert all("net.0.weight" not in sample.own for sample in bank)
    for place in ("cpu", module.net[0].weight.device):
        bank.load_into(module.to(place), 0)
        assert torch.equal(module.net[0].weight.cpu(), frozen)
