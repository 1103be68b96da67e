"""Smoke test of an installed package: a run, its bank, the ensemble, a resume. Prints one line, fails loudly.

Run it outside the repository with the interpreter that has the package::

    python smoke.py [--backend fused|reference]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_lpsgld
from lightning_lpsgld import LowPrecisionSGLD, PosteriorEnsemble, SampleBank, SampleCollector
from lightning_lpsgld.ops.cpu_library import load


class Classifier(L.LightningModule):
    """Two layers; nothing in it knows of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, 2)."""
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer: the plugin takes its learning rate and weight decay."""
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-3)


def main() -> None:
    """Train, reload, average."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("fused", "reference"), help="what the installation must have")
    wanted = parser.parse_args().backend
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    backend = "reference" if load()[0] is None else "fused"
    if wanted not in (None, backend):
        raise SystemExit(f"the installation runs on the {backend} operations, expected {wanted}")
    L.seed_everything(0, verbose=False)
    x = torch.randn(512, 2)
    loader = DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), 64, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        bank = Path(folder) / "bank"
        trainer = L.Trainer(
            max_epochs=60, plugins=[LowPrecisionSGLD(temperature=1e-3)], logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[SampleCollector(start=0.5, every=40, path=bank)],
        )  # fmt: skip
        trainer.fit(Classifier(), loader)
        samples = len(SampleBank.open(bank))
        ensemble = PosteriorEnsemble.from_bank(Classifier(), bank)
        predicted = ensemble(x).labels
        accuracy = float((predicted == (x[:, 0] * x[:, 1] > 0)).float().mean())
    if samples < 4 or accuracy < 0.9:
        raise SystemExit(f"{samples} samples with accuracy {accuracy:.3f}; expected at least 4 and 0.9")
    print(f"lightning_lpsgld {lightning_lpsgld.__version__}: {backend}, {samples} samples, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
