"""A perceptron with batch norm through the Trainer with all defaults: scales pass 1, and the loss is full precision's.

Batch-norm scales begin at 1 and are blocks of one element: whoever clamps at the top of a block holds those below 1
that ought to come back, and with them the loss.
"""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from helpers.models import make_trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.tops import at_top

FP32 = {"weights": None, "gradients": None, "activations": None, "errors": None}
CLAMP = dict.fromkeys(FP32, "bfp8-clamp")


class Perceptron(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        hidden = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trained(**options):
    """Train NLL, and the share of the 128 scales whose nearest bfp8 value is the top code, after 12 epochs."""
    inputs, targets = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets)
    module = Perceptron()
    loader = DataLoader(TensorDataset(inputs, targets), 64, shuffle=True, generator=torch.Generator().manual_seed(1))
    make_trainer(max_epochs=12, plugins=[LowPrecisionSGLD(seed=2, **options)]).fit(module, loader)
    module.eval()
    with torch.no_grad():
        nll = float(nn.functional.cross_entropy(module.net(inputs), targets))
    scales = torch.cat([layer.weight.detach() for layer in module.net if isinstance(layer, nn.BatchNorm1d)])
    standing = at_top(quantize(scales, "bfp8", rounding="nearest"), parse_format("bfp8"))
    return nll, float(standing.double().mean())


@pytest.fixture(scope="module")
def full_precision():
    return trained(**FP32)


def test_defaults_train_as_full_precision_does(full_precision):
    """Chance level is the share of full precision's scales, which crowd about 1, that round to the top code."""
    nll, standing = trained()
    assert nll == pytest.approx(full_precision[0], rel=0.03)
    assert standing < full_precision[1] + 0.09  # three standard errors of 128 scales


def test_the_published_rule_holds_most_scales_and_the_loss(full_precision):
    nll, standing = trained(**CLAMP)
    assert nll > 1.05 * full_precision[0]
    assert standing > full_precision[1] + 0.4
