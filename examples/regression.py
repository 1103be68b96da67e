"""Regression with the posterior sampled in 8 bits: scikit-learn's diabetes data, and a curve with its band.

python examples/regression.py                  # both parts; table, JSON and figure in examples/results (2 minutes)
python examples/regression.py --part diabetes  # the table alone
python examples/regression.py --part curve     # the figure alone
"""

from __future__ import annotations

import argparse
import json
import logging
import math
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
from lightning_lpsgld.predictive import bayesian_model_average

COLUMNS = ("rmse", "nll", "crps", "coverage_90", "width_90", "epistemic", "aleatoric")


class Gaussian(L.LightningModule):
    """A network that gives a mean and a log variance; its loss is their negative log likelihood."""

    def __init__(self, inputs: int, lr: float, weight_decay: float, width: int = 50):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head, self.lr, self.weight_decay = nn.Linear(width, 2), lr, weight_decay

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Mean and log variance by name: the callback reads them so."""
        mean, log_variance = self.head(self.net(x)).unbind(1)
        return {"mean": mean, "log_variance": log_variance.clamp(-5.0, 3.0)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean negative log likelihood."""
        out, y = self(batch[0]), batch[1]
        return 0.5 * (out["log_variance"] + (y - out["mean"]).square() / out["log_variance"].exp()).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback scores."""

    def configure_optimizers(self) -> Any:
        """SGD, from which the plugin takes learning rate and weight decay."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, weight_decay=self.weight_decay)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.3, total_iters=self.trainer.max_epochs),
        }


def fit(
    module: Gaussian, train: TensorDataset, test: TensorDataset, epochs: int, plugin: LowPrecisionSGLD, samples: int
) -> tuple[dict[str, float], Any, float]:
    """Train, collect so many samples evenly over the second half (the last weights among them), test.

    Returns:
        Scores as ``EnsembleEvaluation`` logs them, the bank, seconds.
    """
    steps = epochs * math.ceil(len(train) / 32)
    collector = SampleCollector(start=steps - samples * (steps // (2 * samples)), every=steps // (2 * samples))
    evaluation = EnsembleEvaluation(stages="test")
    trainer = L.Trainer(
        max_epochs=epochs, plugins=[plugin], callbacks=[collector, evaluation], accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(module, DataLoader(train, 32, shuffle=True))
    trainer.test(module, DataLoader(test, 256), verbose=False)
    return evaluation.scores, collector.bank, time.perf_counter() - began


def diabetes_data() -> tuple[TensorDataset, TensorDataset]:
    """The 442 patients, standardized by the training part of 353."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[: int(0.8 * len(y))], order[int(0.8 * len(y)) :]
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


class Diabetes(L.LightningDataModule):
    """The same data for the command line (``configs/regression.yaml``)."""

    def train_dataloader(self) -> DataLoader:
        """Batches of 32."""
        return DataLoader(diabetes_data()[0], batch_size=32, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        """The 89 patients that are held out."""
        return DataLoader(diabetes_data()[1], batch_size=256)


def diabetes(epochs: int = 100, samples: int = 30) -> dict[str, dict[str, float]]:
    """Rows of the table: SGD's last weights, one sample on average, the ensemble; unit: one deviation of the target."""
    train, test = diabetes_data()
    decay = 1.0 / len(train)  # a prior of standard deviation 1
    rows = {}
    for label, preset, temperature in (("SGD, float32", "sgd-fp", 0.0), ("8-bit SGLD", "vc-sgldlp-l-bfp8", 1.0)):
        L.seed_everything(0, verbose=False)
        plugin = LowPrecisionSGLD.preset(preset, **({"temperature": temperature} if temperature else {}))
        count = samples if temperature else 1  # of SGD the last weights alone
        scores, bank, seconds = fit(Gaussian(10, 0.01, decay), train, test, epochs, plugin, count)
        kinds = {"one sample": "single", "ensemble": "ensemble"} if temperature else {"last weights": "ensemble"}
        for kind, prefix in kinds.items():
            rows[f"{label}, {kind}"] = {
                **{name: scores[f"{prefix}/{name}"] for name in COLUMNS if f"{prefix}/{name}" in scores},
                "size": scores["ensemble/size"] if prefix == "ensemble" else 1,
                "bytes": bank.nbytes / len(bank),
                "seconds": seconds,
            }
    return rows


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """One line a method."""
    print(score_table(rows, COLUMNS, width=13, digits=3))


def curve_data(points: int = 400) -> TensorDataset:
    """sin(3x) with noise that grows with x, and nothing between 0 and 0.8."""
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(points // 2, generator=draw) - 1.0, 0.8 + 0.7 * torch.rand(points // 2, generator=draw)])
    noise = (0.05 + 0.1 * (x + 1)) * torch.randn(len(x), generator=draw)
    return TensorDataset(x[:, None], torch.sin(3 * x) + noise)


def curve(path: Path | None, epochs: int = 300, samples: int = 40) -> dict[str, float]:
    """Mean, 90 % band and its epistemic part over the line; the picture goes to ``path``.

    Returns:
        Mean epistemic variance where there are data, and in the gap between them.
    """
    data = curve_data()
    L.seed_everything(1, verbose=False)
    module = Gaussian(1, 0.02, 1.0 / len(data), width=30)
    _, bank, _ = fit(module, data, data, epochs, LowPrecisionSGLD(temperature=1.0), samples)
    line = torch.linspace(-1.5, 2.0, 351)
    predictive = bayesian_model_average(bank, module, [line[:, None]], task="regression", metrics=None).predictive
    low, high = predictive.interval(0.9)
    gap = (line > 0.2) & (line < 0.6)
    inside = ((line > -1) & (line < 0)) | ((line > 0.8) & (line < 1.5))
    if path is not None:
        draw_band(path, data, line, predictive, (low, high))
    return {
        "with data": float(predictive.epistemic[inside].mean()),
        "in the gap": float(predictive.epistemic[gap].mean()),
    }


def draw_band(path: Path, data: TensorDataset, line: Tensor, predictive: Any, band: tuple[Tensor, Tensor]) -> None:
    """Points, mean, 90 % band, and the band of the samples' means alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    mean, spread = predictive.mean, 1.645 * predictive.epistemic.sqrt()
    axes.fill_between(line, band[0], band[1], color="C0", alpha=0.2, label="90 % of the predictive density")
    axes.fill_between(line, mean - spread, mean + spread, color="C0", alpha=0.4, label="of which the samples' means")
    axes.plot(line, mean, color="C0", label="mean of the ensemble")
    axes.plot(line, torch.sin(3 * line), color="0.3", linestyle="--", linewidth=1, label="truth")
    axes.plot(data.tensors[0][:, 0], data.tensors[1], ".", color="k", markersize=4, label="data")
    axes.set(xlabel="x", ylabel="y", ylim=(-3, 3), title="An 8-bit posterior knows where it has seen nothing")
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "diabetes", "curve"), default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part in ("all", "diabetes"):
        rows = diabetes()
        print_table(rows)
        (args.out / "regression.json").write_text(json.dumps(rows, indent=1))
    if args.part in ("all", "curve"):
        found = curve(args.out / "regression.png")
        print("epistemic variance: " + ", ".join(f"{value:.4f} {where}" for where, value in found.items()))


if __name__ == "__main__":
    main()
