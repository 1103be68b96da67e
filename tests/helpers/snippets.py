"""What the pages assume to be there: a module, data, a bank; the names that their snippets use without saying so."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_lpsgld
import lightning_lpsgld.callbacks
import lightning_lpsgld.strategies
from lightning_lpsgld import SampleBank


class Module(L.LightningModule):
    """A classifier of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-3)


class Data(L.LightningDataModule):
    """Forty points with two classes."""

    def __init__(self) -> None:
        super().__init__()
        x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(x, (x.sum(1) > 0).long())

    def train_dataloader(self):
        return DataLoader(self.data, 20)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def namespace() -> dict[str, Any]:
    """Names that snippets take for granted; a bank of three samples is in the current folder."""
    model, data = Module(), Data()
    with SampleBank("bank") as bank:
        for step in range(3):
            torch.nn.init.normal_(model.net.weight)
            bank.add(model, step=step)
    trainer = functools.partial(L.Trainer, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False)
    loader = data.train_dataloader()
    names: dict[str, Any] = {}
    for package in (lightning_lpsgld, lightning_lpsgld.callbacks, lightning_lpsgld.strategies):
        names |= {name: getattr(package, name) for name in package.__all__}
    x, y = data.data.tensors
    loss_fn = torch.nn.functional.cross_entropy

    def closure(inputs, targets):
        model.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        return loss

    return names | {
        "__name__": "__main__", "functools": functools, "torch": torch, "L": SimpleNamespace(Trainer=trainer),
        "Trainer": trainer, "ModelCheckpoint": ModelCheckpoint, "model": model, "module": model, "datamodule": data,
        "batch": (x, y), "loader": loader, "train_loader": loader, "val_loader": loader, "test_loader": loader,
        "new_loader": loader, "X": x.numpy(), "y": x.sum(1).numpy(), "epochs": 1, "loss_fn": loss_fn,
        "closure": closure,
    }  # fmt: skip
