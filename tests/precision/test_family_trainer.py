"""SGHMC, preconditioned SGLD and the lattice walk in the Trainer by ``sampler=`` alone."""

import functools

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.samplers import SGHMC, SGLD, PreconditionedSGLD

FAMILY = {
    "VC SGHMCLP-L (velocity bfp8)": functools.partial(SGHMC, friction=2.0, velocity_format="bfp8"),
    "VC pSGLDLP-L (low-precision accumulator)": PreconditionedSGLD,
    "lattice SGLDLP-L (bernoulli rates)": functools.partial(SGLD, variant="lattice"),
    "VC SGLDLP-L (bfp16 accumulator)": functools.partial(SGLD, accumulator="bfp16"),
}


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append([p.detach().clone() for p in self.parameters()])
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


@pytest.mark.parametrize("name", FAMILY)
def test_a_fit_steps_the_sampler_on_the_grid_and_says_which_it_is(name):
    x = torch.linspace(-1, 1, 128).reshape(32, 4).sin()
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    plugin, module = LowPrecisionSGLD(sampler=FAMILY[name], seed=3), Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=2, plugins=[plugin], accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, data)
    assert plugin.card is not None
    assert plugin.card.sampler == name
    assert trainer.optimizers[0].steps == 8
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0125
    assert (plugin.card.formats.get("accumulators") == "bfp16") == ("bfp16" in name)
    for params in (module.seen[0], module.seen[-1]):
        assert all(torch.equal(quantize(p, "bfp8", rounding="nearest"), p) for p in params), "a weight is off the grid"
    assert not all(torch.equal(a, b) for a, b in zip(module.seen[0], module.seen[-1]))


def test_the_card_says_where_the_sum_lives_and_how_far_its_rounding_reaches():
    """At v = 4e-9 Q^vc reaches no weight of 8 bits whatever the gradient, and every sum of 24."""
    x = torch.linspace(-1, 1, 128).reshape(32, 4).sin()
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    cards = {}
    for accumulator in ("low", "bfp24", "full"):
        plugin = LowPrecisionSGLD(accumulator=accumulator, num_data=25_000, seed=3)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_steps=1, plugins=[plugin], accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(Classifier(), data)
        cards[accumulator] = plugin.card
    assert cards["low"].noise_variance == pytest.approx((4e-9,))
    assert [card.reachable_always for card in cards.values()] == [0.0, 1.0, None]
    assert "accumulators bfp24" in str(cards["bfp24"])
    assert "within reach of the rounding at 100.0 %" in str(cards["bfp24"])
