"""Segmentation with the posterior sampled in 8 bits: discs and squares in noise, a void border that does not count.

python examples/segmentation.py   # table and JSON in examples/results (1 minute)
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from score_table import score_table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, SampleCollector

COLUMNS = ("accuracy", "nll", "brier", "ece", "calibrated_nll", "aurc", "disagreement")
VOID = 255


def shapes(count: int, seed: int, side: int = 20, noise: float = 1.0) -> TensorDataset:
    """One disc (class 1) and one square (class 2) on an empty ground; pixels at the image's border are void.

    Returns:
        Images ``(count, 1, side, side)`` and targets ``(count, side, side)``.
    """
    draw = torch.Generator().manual_seed(seed)
    grid = torch.arange(side, dtype=torch.float32)
    y, x = grid[None, :, None], grid[None, None, :]
    centers = 5 + (side - 10) * torch.rand(count, 4, 1, 1, generator=draw)
    disc = (y - centers[:, 0]).square() + (x - centers[:, 1]).square() <= 16
    square = torch.maximum((y - centers[:, 2]).abs(), (x - centers[:, 3]).abs()) <= 3
    targets = torch.where(square, 2, torch.where(disc, 1, 0))
    images = (targets > 0).float()[:, None] + noise * torch.randn(count, 1, side, side, generator=draw)
    border = (torch.minimum(y, x) < 1) | (torch.maximum(y, x) > side - 2)
    return TensorDataset(images, targets.masked_fill(border.expand_as(targets), VOID))


class Segmenter(L.LightningModule):
    """Four convolutions, dilated in the middle so that a pixel sees a whole shape."""

    def __init__(self, lr: float = 0.1, weight_decay: float = 1e-4, width: int = 12):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2), nn.ReLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip
        self.lr, self.weight_decay = lr, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``(batch, classes, height, width)``."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy of the pixels that count."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1], ignore_index=VOID)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback scores."""

    def configure_optimizers(self) -> Any:
        """SGD, from which the plugin takes learning rate and weight decay."""
        return torch.optim.SGD(self.parameters(), self.lr, weight_decay=self.weight_decay)


class Shapes(L.LightningDataModule):
    """The same images for the command line (``configs/segmentation.yaml``)."""

    def train_dataloader(self) -> DataLoader:
        """Batches of 16."""
        return DataLoader(shapes(256, 0), batch_size=16, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        """Half as many others."""
        return DataLoader(shapes(128, 1), batch_size=64)


def compare(epochs: int = 24, images: int = 256, samples: int = 12) -> dict[str, dict[str, float]]:
    """Rows of the table: SGD's last weights, one 8-bit sample on average, the ensemble."""
    train, test = shapes(images, 0), shapes(images // 2, 1)
    rows = {}
    for label, preset, count in (("SGD, float32", "sgd-fp", 1), ("8-bit SGLD", "vc-sgldlp-l-bfp8", samples)):
        L.seed_everything(0, verbose=False)
        steps = epochs * -(-images // 16)
        collector = SampleCollector(start=steps - count * (steps // (2 * count)), every=steps // (2 * count))
        evaluation = EnsembleEvaluation(stages="test", ignore_index=VOID)
        trainer = L.Trainer(
            max_epochs=epochs, plugins=[LowPrecisionSGLD.preset(preset)], callbacks=[collector, evaluation],
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        began, module = time.perf_counter(), Segmenter()
        trainer.fit(module, DataLoader(train, 16, shuffle=True))
        trainer.test(module, DataLoader(test, 64), verbose=False)
        seconds, bank, scores = time.perf_counter() - began, collector.bank, evaluation.scores
        kinds = {"last weights": "ensemble"} if count == 1 else {"one sample": "single", "ensemble": "ensemble"}
        for kind, prefix in kinds.items():
            found = {name: scores[f"{prefix}/{name}"] for name in COLUMNS if f"{prefix}/{name}" in scores}
            size = scores["ensemble/size"] if prefix == "ensemble" else 1
            rows[f"{label}, {kind}"] = found | {"size": size, "bytes": bank.nbytes / len(bank), "seconds": seconds}
    return rows


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """One line a method."""
    print(score_table(rows, COLUMNS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    rows = compare()
    print_table(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "segmentation.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
