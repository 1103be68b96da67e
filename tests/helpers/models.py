"""Tiny LightningModules and a synthetic data module, for tests that run a Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def synthetic_classes(n: int, shape: tuple[int, ...], classes: int, seed: int) -> TensorDataset:
    """Noisy class means: inputs of ``shape``, targets in ``range(classes)``; means are the same for every ``seed``."""
    means = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(1234))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (n,), generator=generator)
    return TensorDataset(means[targets] + torch.randn(n, *shape, generator=generator), targets)


class SyntheticData(pl.LightningDataModule):
    """Train, validation and test sets of noisy class means; the last batches are smaller than the others."""

    def __init__(
        self, n_train: int = 64, n_eval: int = 37, batch_size: int = 8, shape: tuple[int, ...] = (6,), classes: int = 3,
        shuffle: bool = True, copies: int = 1, **loader: Any,
    ) -> None:  # fmt: skip
        """``copies`` repeats the training set, so that with ``n_train == batch_size`` every batch is the same one."""
        super().__init__()
        self.batch_size, self.shuffle, self.loader = batch_size, shuffle, loader
        inputs, targets = synthetic_classes(n_train, shape, classes, seed=0).tensors
        self.train = TensorDataset(inputs.repeat(copies, *(1 for _ in shape)), targets.repeat(copies))
        self.val = synthetic_classes(n_eval, shape, classes, seed=1)
        self.test = synthetic_classes(n_eval, shape, classes, seed=2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=self.shuffle, **self.loader)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size, **self.loader)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.batch_size, **self.loader)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()


class Classifier(pl.LightningModule):
    """Wraps a network that maps inputs to logits; knows nothing of low precision."""

    def __init__(self, net: nn.Module, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.net, self.lr, self.weight_decay = net, lr, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def _loss(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self(inputs), targets)
        self.log(name, loss)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch, "train_loss")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._loss(batch, "val_loss")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._loss(batch, "test_loss")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


def small_mlp(seed: int = 0, dropout: float = 0.0, **options: Any) -> Classifier:
    """Two linear layers on 6 inputs, 3 classes; initial weights are a function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)), **options)


def small_convnet(seed: int = 0, **options: Any) -> Classifier:
    """Convolution, BatchNorm, linear on 1x6x6 images, 3 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        return Classifier(nn.Sequential(*body, nn.Linear(16, 3)), **options)


class RecordingLogger(Logger):
    """Keeps what is logged, as ``(step, {name: value})`` rows."""

    name, version = "recording", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def make_trainer(**options: Any) -> pl.Trainer:
    """Silent single-process CPU trainer without logger or checkpoints; ``options`` override."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(**{**quiet, **options})
