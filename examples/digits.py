"""Main job: 8-bit posterior sampling of a small convolutional net on scikit-learn's digits (embedded, no download).

Trains fp32 SGD, fp32 SGLD, naive SGLDLP-L, VC SGLDLP-L and SGLDLP-F in 8-bit block floating point through the Lightning
Trainer, prints one table and draws one figure::

    python examples/digits.py

Needs the extra ``examples``: ``pip install "lightning_lpsgld[examples]"``.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from comparison import METHODS, draw_figure, print_table, train_and_evaluate
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningDataModule):
    """1,797 images of 8x8 pixels in 10 classes; every third one is a test image."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
        y = torch.tensor(digits.target)
        test = torch.arange(len(y)) % 3 == 0
        self.train, self.test = TensorDataset(x[~test], y[~test]), TensorDataset(x[test], y[test])

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        """The test images in order."""
        return DataLoader(self.test, batch_size=256)


def small_convnet() -> nn.Module:
    """Two convolutions with batch normalization and a linear classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each method (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1e-3, help="posterior temperature (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and sampler")
    parser.add_argument("--figure", type=Path, default=Path("runs/digits.png"), help="where the figure goes")
    parser.add_argument("--progress", action="store_true", help="show progress bars and posterior cards")
    args = parser.parse_args()
    if not args.progress:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    results = []
    for label, preset in METHODS.items():
        results.append(
            train_and_evaluate(
                label, preset, small_convnet, Digits(), epochs=args.epochs, lr=args.lr, weight_decay=5e-4, burn_in=0.5,
                temperature=args.temperature, seed=args.seed, progress=args.progress,
            )
        )  # fmt: skip
        print(f"{label}: done in {results[-1].seconds:.0f} s", flush=True)
    print_table(results)
    draw_figure(results, args.figure)


if __name__ == "__main__":
    main()
