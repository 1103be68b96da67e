"""Train the same network by several samplers through the Trainer; one table, one figure.

Shared by ``digits.py`` and ``image_classification.py``; not a script of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_lpsgld import EffectiveTemperature, EnsembleEvaluation, LowPrecisionSGLD, SampleCollector

#: Row label -> preset of the plugin, in the order of the table.
METHODS = {
    "SGD, fp32": "sgd-fp",
    "SGLD, fp32": "sgld-fp",
    "naive SGLDLP-L, bfp8": "naive-sgldlp-l-bfp8",
    "VC SGLDLP-L, bfp8": "vc-sgldlp-l-bfp8",
    "SGLDLP-F, bfp8": "sgldlp-f-bfp8",
}


class Classifier(L.LightningModule):
    """A plain classifier: nothing in it knows of low precision or sampling."""

    def __init__(self, net: nn.Module, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.net = net
        self.lr, self.weight_decay = lr, weight_decay

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, classes)."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross entropy of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Single-model accuracy of the last weights."""
        x, y = batch
        self.log("test/accuracy", (self(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD; the plugin takes its learning rate, weight decay and schedule."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


@dataclass
class Result:
    """What one method reached."""

    label: str
    metrics: dict[str, float]
    curve: list[dict[str, float]]
    bank_bytes: int
    fp32_bytes: int
    seconds: float
    reliability: Any = None
    extra: dict[str, float] = field(default_factory=dict)


def train_and_evaluate(
    label: str,
    preset: str,
    make_net: Callable[[], nn.Module],
    data: L.LightningDataModule,
    *,
    epochs: int,
    lr: float,
    weight_decay: float,
    burn_in: float,
    temperature: float,
    seed: int,
    progress: bool = False,
) -> Result:
    """Fit, collect one sample an epoch after burn-in, test the ensemble.

    Args:
        label: Row label.
        preset: Name of a plugin preset.
        make_net: Makes the network; called after seeding, so every method starts from the same weights.
        data: The data.
        epochs: Length of the run.
        lr: Learning rate at the start.
        weight_decay: Weight decay.
        burn_in: Share of the run before the first sample.
        temperature: Temperature of the samplers; the SGD preset keeps 0.
        seed: Seed of weights, data order and sampler.
        progress: Show progress bars.

    Returns:
        The metrics on the test set, and the sizes.
    """
    L.seed_everything(seed)
    module = Classifier(make_net(), lr, weight_decay)
    overrides = {} if preset.startswith(("sgd-", "sgdlp-")) else {"temperature": temperature}
    collector = SampleCollector(start=burn_in, every="epoch")
    evaluation = EnsembleEvaluation(stages=("test",))
    trainer = L.Trainer(
        max_epochs=epochs,
        plugins=[LowPrecisionSGLD.preset(preset, **overrides)],
        callbacks=[collector, evaluation, EffectiveTemperature(every_n_steps=200, verdict=False)],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        log_every_n_steps=20,
    )
    began = time.perf_counter()
    trainer.fit(module, data)
    fit_metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    trainer.test(module, data, verbose=False)
    seconds = time.perf_counter() - began
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    bank = collector.bank
    return Result(
        label, metrics, evaluation.curve, bank.nbytes, bank.nbytes_fp32, seconds,
        reliability=evaluation.reliability[0], extra=fit_metrics,
    )  # fmt: skip


def print_table(results: list[Result]) -> None:
    """One line a method: the last weights alone (single) and the average over the samples (ensemble)."""
    print(
        f"\n{'':<22} | {'single model':^22} | {'ensemble':^28} | {'bank':^17} | {'T_eff/T':>7} {'batch':>6} | "
        f"{'time':>5}\n"
        f"{'method':<22} | {'err %':>6} {'NLL':>7} {'ECE %':>6}  | {'err %':>6} {'NLL':>7} {'ECE %':>6} {'size':>5}  "
        f"| {'MB':>7} {'of fp32':>8}  | {'':>7} {'noise':>6} | {'s':>5}"
    )
    for r in results:
        m = r.metrics
        ratio = r.extra.get("noise/achieved_over_target", float("nan"))
        beside = r.extra.get("noise/minibatch_over_target", float("nan"))  # over the variance asked for, too
        print(
            f"{r.label:<22} | {100 * (1 - m['current/accuracy']):6.2f} {m['current/nll']:7.4f} "
            f"{100 * m['current/ece']:6.2f}  | {100 * (1 - m['ensemble/accuracy']):6.2f} {m['ensemble/nll']:7.4f} "
            f"{100 * m['ensemble/ece']:6.2f} {int(m['ensemble/size']):5d}  | {r.bank_bytes / 1e6:7.3f} "
            f"{r.bank_bytes / r.fp32_bytes:8.3f}  | {ratio:7.2f} {beside:6.2f} | {r.seconds:5.1f}"
        )


def draw_figure(results: list[Result], path: Path) -> None:
    """Left: reliability diagram of each ensemble. Right: ensemble size against test error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfect calibration")
    for i, r in enumerate(results):
        bins = r.reliability
        filled = bins.count >= 5  # fewer points say nothing
        style = {"color": f"C{i}", "marker": "osD^v"[i % 5], "markersize": 4, "linewidth": 1.2, "label": r.label}
        left.plot(bins.confidence[filled], bins.accuracy[filled], **style)
        sizes = [row["size"] for row in r.curve]
        right.plot(sizes, [100 * (1 - row["ensemble/accuracy"]) for row in r.curve], **style)
    left.set(xlabel="confidence", ylabel="accuracy", title="Reliability of the ensemble (bins of 5 and more)")
    right.set(xlabel="samples in the ensemble", ylabel="test error, %", title="Ensemble size against error")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"\nfigure: {path}")


__all__ = ["METHODS", "Classifier", "Result", "draw_figure", "print_table", "train_and_evaluate"]
