"""What cannot work says so early, names itself and the way out."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import FSDPStrategy
from test_compatibility import Module, fit, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lpsgld import LowPrecisionSGLD, SampleBank, SampleCollector


def test_manual_optimization_that_never_steps_our_sampler(tmp_path):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.own = torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            self.own.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.own.step()

    with pytest.raises(RuntimeError, match=r"never stepped.*step what `self.optimizers\(\)` returns"):
        fit(tmp_path, Manual(), data=loader(count=80, batch_size=1))


def test_fsdp_v1_names_the_way():
    with pytest.raises(TypeError, match=r"FSDPPrecision.*ModelParallelStrategy \(FSDP2\)"):
        FSDPStrategy(precision_plugin=LowPrecisionSGLD())


def test_another_precision_plugin():
    with pytest.raises((ValueError, MisconfigurationException), match="Precision"):
        L.Trainer(plugins=[LowPrecisionSGLD(), DoublePrecision()], accelerator="cpu")


def test_half_precision_compute_would_need_a_gradscaler():
    with pytest.raises(ValueError, match="GradScaler"):
        LowPrecisionSGLD(compute="16-mixed")


def test_sparse_gradients(tmp_path):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8, sparse=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.embed(x).mean(1))

    with pytest.raises(TypeError, match=r"net\.embed\.weight.*sparse=False"):
        fit(tmp_path, Module(Table()), data=loader(shape=(5,), sequence_of=11), limit_val_batches=0)


def test_num_data_that_cannot_be_known(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            for _ in range(4):
                yield torch.randn(6), torch.tensor(0)

    with pytest.raises(ValueError, match=r"Stream has no length.*num_data=\.\.\."):
        fit(tmp_path, Module(), data=DataLoader(Stream(), 2))
    fit(tmp_path, Module(), LowPrecisionSGLD(num_data=4, seed=0), data=DataLoader(Stream(), 2))


def test_two_train_dataloaders_are_ambiguous(tmp_path):
    class Two(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    data = {"a": loader(), "b": loader()}
    with pytest.raises(ValueError, match="2 train dataloaders"):
        trainer(tmp_path).fit(Two(), data)


def test_format_wider_than_the_dtype(tmp_path):
    with pytest.raises(ValueError, match=r"weights='fixed12\.8'\) cannot hold net\.0\.weight.*bfloat16"):
        trainer(tmp_path, LowPrecisionSGLD(weights="fixed12.8")).fit(Module().bfloat16(), loader())


def test_no_layer_matched(tmp_path):
    with pytest.raises(ValueError, match="match"):
        trainer(tmp_path, LowPrecisionSGLD(sites=["no_such_layer*"])).fit(Module(), loader())


def test_no_optimizer(tmp_path):
    with pytest.raises(RuntimeError, match="returned no optimizer"):
        trainer(tmp_path).fit(Module(optimizer=lambda m: None), loader())


def test_averaging_callbacks_with_a_full_accumulator(tmp_path):
    plugin = LowPrecisionSGLD(accumulator="full")
    with pytest.raises(RuntimeError, match="averages `parameters\\(\\)`"):
        trainer(tmp_path, plugin, callbacks=[StochasticWeightAveraging(0.01)]).fit(Module(), loader())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1.0}, "`temperature` must be >= 0"),
        ({"num_data": 0}, "`num_data` must be 'auto' or an int >= 1"),
        ({"accumulator": "half"}, "LowPrecisionSGLD: `accumulator` must be .low., .full. or a number format"),
        ({"accumulator": "bfp16", "weights": None}, "leave `accumulator` at .low. and take weights=.bfp16."),
        ({"backend": "cuda"}, "`backend` must be one of"),
        ({"saved_activations": "bits"}, "`saved_activations` must be one of"),
        ({"cycles": 0}, "`cycles` must be >= 1"),
        ({"weights": "int8"}, "No number format is called 'int8'"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        LowPrecisionSGLD(**options)


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match=r"No preset is called 'sgld-9000'.*vc-sgldlp-l-bfp8"):
        LowPrecisionSGLD.preset("sgld-9000")


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_nan_is_refused_and_names_the_parameter(tmp_path, bad):
    class Broken(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if bad == "loss" and batch_idx == 1 else loss

        def on_after_backward(self):
            if bad == "gradient" and self.trainer.global_step == 1:
                self.net[2].bias.grad[0] = float("inf")

    module, collector = Broken(), SampleCollector(tmp_path / "bank", every=1)
    with pytest.raises(FloatingPointError, match="loss is nan at step 1" if bad == "loss" else r"net\.2\.bias.*step 1"):
        fit(tmp_path, module, callbacks=[collector])
    assert all(p.isfinite().all() for p in module.parameters())
    bank = SampleBank.open(tmp_path / "bank")
    assert (len(bank), bank.damaged) == (1, [])
    bank.load_into(module, 0)
