"""The first rounding: a frozen weight is not the sampler's to change, and what rounding destroys is said."""

import logging

import pytest
import torch
from helpers.models import Classifier, SyntheticData, make_trainer
from torch import nn

from lightning_lpsgld import LowPrecisionSGLD, SampleBank, SampleCollector
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.samplers import SGHMC, SGLD, SVRG, PreconditionedSGLD

MAKE = {
    "SGLD": lambda params, **options: SGLD(params, 0.1, num_data=10, **options),
    "SGLD full": lambda params, **options: SGLD(params, 0.1, num_data=10, accumulator="full", **options),
    "SGHMC": lambda params, **options: SGHMC(params, 0.1, num_data=10, friction=1.0, **options),
    "pSGLD": lambda params, **options: PreconditionedSGLD(params, 0.1, num_data=10, **options),
    "SVRG": lambda params, **options: SVRG(params, 0.1, **options),
}


def weights():
    frozen = nn.Parameter(torch.linspace(-0.77, 0.77, 12).reshape(3, 4), requires_grad=False)
    moving = nn.Parameter(torch.linspace(-0.77, 0.77, 12).reshape(3, 4))
    return frozen, moving


@pytest.mark.parametrize("name", MAKE)
def test_a_frozen_weight_stays_as_it_is_until_it_is_thawed(name):
    frozen, moving = weights()
    kept = frozen.detach().clone()
    opt = MAKE[name]([frozen, moving], weight_format="fixed8.3")
    opt.round_parameters_()
    assert torch.equal(frozen, kept)
    assert opt.format_of(frozen) is None
    assert torch.equal(moving, quantize(kept, "fixed8.3", rounding="nearest"))
    assert str(opt.format_of(moving)) == "fixed8.3"

    frozen.requires_grad_(True)

    def closure():
        opt.zero_grad()
        loss = (frozen.square() + moving.square()).sum()
        loss.backward()
        return loss

    if name == "SVRG":
        opt.recentre(closure)
    opt.step(closure)
    assert str(opt.format_of(frozen)) == "fixed8.3"
    assert torch.equal(frozen, quantize(frozen.detach(), "fixed8.3", rounding="nearest"))


def test_a_frozen_weight_that_lies_on_the_grid_keeps_its_format():
    """As after a resume, or where training froze it: a sample stores it in 8 bits."""
    frozen, moving = weights()
    frozen.data = quantize(frozen.data, "bfp8", rounding="nearest")
    opt = SGLD([frozen, moving], 0.1, num_data=10, weight_format="bfp8")
    opt.round_parameters_()
    assert str(opt.format_of(frozen)) == "bfp8"


def test_a_bank_gives_a_frozen_weight_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    module = Classifier(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.detach().clone()
    trainer = make_trainer(
        max_epochs=1, plugins=[LowPrecisionSGLD(seed=0)], callbacks=[SampleCollector(tmp_path / "bank", every=4)],
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, SyntheticData())
    assert torch.equal(module.net[0].weight, before)
    with torch.no_grad():
        module.net[0].weight.zero_()
    SampleBank.open(tmp_path / "bank").load_into(module, 0)
    assert torch.equal(module.net[0].weight, before)


@pytest.mark.parametrize("name", MAKE)
def test_rounding_that_leaves_only_zeros_names_the_tensors(name, caplog):
    _, moving = weights()
    zeros = nn.Parameter(torch.zeros(2))
    opt = MAKE[name]([("body.weight", moving), ("bias", zeros)], weight_format="fixed8.-5")
    with caplog.at_level(logging.WARNING):
        opt.round_parameters_()
    said = [record.getMessage() for record in caplog.records if "nothing but zeros" in record.getMessage()]
    assert len(said) == 1
    assert "to fixed8.-5 left nothing but zeros of body.weight: every weight was" in said[0]
    assert "half the gap of 32" in said[0]
    assert not moving.any()


def test_rounding_that_leaves_something_is_not_said(caplog):
    _, moving = weights()
    with caplog.at_level(logging.WARNING):
        SGLD([moving], 0.1, num_data=10, weight_format="fixed8.3").round_parameters_()
    assert not caplog.records
