"""Fashion-MNIST in memory, with shifts and flips or plain, and a network that overfits a plain part of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from image_classification import DATA, BasicBlock, idx_folder

__all__ = ["NAMES", "Fashion", "resnet8"]

#: Names of the data in tables: with shifts and flips, and as they are.
NAMES = ("fashion-mnist", "fashion-mnist-plain")

#: Images are shifted by up to so many pixels, filled with the background.
_SHIFT = 2


class _Shuffled:
    """Batches of a shuffled epoch, every image shifted and flipped at random if asked: whole batches at once."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, background: float | None) -> None:
        self.dataset = TensorDataset(images, labels)
        self.batch_size, self.background = batch_size, background

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        order = torch.randperm(len(images), device=images.device)
        for number in range(len(self)):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            batch = images[chosen]
            yield batch if self.background is None else _moved(batch, self.background), labels[chosen]


def _moved(images: Tensor, background: float) -> Tensor:
    (count, _, height, width), device = images.shape, images.device
    padded = nn.functional.pad(images, (_SHIFT,) * 4, value=background)
    down, right = (torch.randint(0, 2 * _SHIFT + 1, (count, 1), device=device) for _ in range(2))
    columns = right + torch.arange(width, device=device)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    rows, image = down + torch.arange(height, device=device), torch.arange(count, device=device)
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Fashion(L.LightningDataModule):
    """The first ``size`` training images, and all 10,000 test images.

    Args:
        root: Folder of the four idx archives, or a torchvision root.
        size: Number of training images.
        batch_size: Images of a training batch.
        test: Number of test images, ``None``: all.
        device: Where the images lie and are augmented; on a GPU no batch is ever copied.
        name: Of :data:`NAMES`.
    """

    def __init__(
        self, root: Path, size: int, batch_size: int = 100, test: int | None = None, device: str = "cpu",
        name: str = "fashion-mnist",
    ) -> None:  # fmt: skip
        super().__init__()
        if name not in NAMES:
            raise ValueError(f"name is {name!r}; use one of {', '.join(NAMES)}.")
        self.name = name
        self.root, self.size, self.batch_size, self.test_size, self.device = root, size, batch_size, test, device

    def setup(self, stage: str) -> None:
        """Read and scale the images."""
        kind, _, _, (mean,), (std,) = DATA["fashion-mnist"]
        parts = []
        for train, limit in ((True, self.size), (False, self.test_size)):
            data = idx_folder(self.root, train)
            if data is None:
                raw = kind(self.root, train=train)
                data = TensorDataset(raw.data.unsqueeze(1), raw.targets)
            images, labels = data.tensors
            images = (images[:limit].to(self.device).float() / 255 - mean) / std
            parts.append((images, labels[:limit].to(self.device).long()))
        self.train, self.test = parts
        self.background, self.spread = -mean / std, std

    def train_dataloader(self) -> _Shuffled:
        """Shuffled batches, shifted and flipped if the name says so."""
        return _Shuffled(*self.train, self.batch_size, self.background if self.name == NAMES[0] else None)

    def test_dataloader(self) -> DataLoader:
        """The test images in order."""
        return DataLoader(TensorDataset(*self.test), 500)


def resnet8(channels: int = 1, classes: int = 10) -> nn.Module:
    """ResNet-8 with 16, 32 and 64 channels and a stem of stride 2: 77,754 weights for one channel and ten classes."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
