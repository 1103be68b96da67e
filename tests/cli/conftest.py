"""A folder with a module, data and a YAML file, as a user has them; the command typed in it."""

import sys

import pytest

pytest.importorskip("jsonargparse")

MODULE = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, width: int = 4, lr: float = 0.1):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be positive, got {width}")
        self.lr = lr
        self.net = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Broken(Net):
    def training_step(self, batch, batch_idx):
        raise KeyError("my own mistake")


class Branching(Net):
    def forward(self, x):
        return self.net(x) if float(x.sum()) > 0 else 2 * self.net(x)


class Data(L.LightningDataModule):
    def _loader(self, seed, n):
        g = torch.Generator().manual_seed(seed)
        data = TensorDataset(torch.randn(n, 3, generator=g), torch.randint(0, 2, (n,), generator=g))
        return DataLoader(data, batch_size=4)

    def train_dataloader(self):
        return self._loader(0, 16)

    def val_dataloader(self):
        return self._loader(1, 30)

    def test_dataloader(self):
        return self._loader(2, 12)

    def predict_dataloader(self):
        return self._loader(2, 12)


class NoTargets(Data):
    def val_dataloader(self):
        return DataLoader(torch.randn(30, 3), batch_size=4)

    test_dataloader = val_dataloader


class OtherClasses(Data):
    def _loader(self, seed, n):
        return DataLoader(TensorDataset(torch.randn(n, 3), torch.full((n,), 9)), batch_size=4)


class NoRows(Data):
    def _loader(self, seed, n):
        return DataLoader(TensorDataset(torch.randn(0, 3), torch.zeros(0, dtype=torch.long)), batch_size=4)


class Several(Data):
    def val_dataloader(self):
        return [self._loader(1, 30), self._loader(2, 30)]

    test_dataloader = val_dataloader


class NotThere(Data):
    def prepare_data(self):
        raise RuntimeError("the archive is not there")
"""
CONFIG = """
seed_everything: 0
model:
  class_path: cli_module.Net
data:
  class_path: cli_module.Data
lpsgld:
  temperature: 0.5
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  max_epochs: 3
  callbacks:
    - class_path: SampleCollector
      init_args:
        path: bank
        every: 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "cli_module.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("cli_module", None)


@pytest.fixture
def lpsgld(capsys, monkeypatch):
    """Types a command in this process; gives its exit code and what it printed, stderr without others' notes."""
    from lightning_lpsgld.cli import main

    monkeypatch.setattr(sys, "argv", ["lpsgld"])

    def typed(*args):
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("lpsgld ")]
        return code, printed.out, errors

    return typed
