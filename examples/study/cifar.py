"""The CIFAR table of the paper, row by row, with the published numbers beside: one command, resumable, for a GPU.

::

    python examples/study/cifar.py --data-dir data                          # CIFAR-10, every row, three seeds
    python examples/study/cifar.py --data cifar100 --data-dir data --only vc-sgldlp-l/bfp8
    python examples/study/cifar.py --show                                   # only the table, of what is stored

``--data-dir`` holds the "python version" as torchvision unpacks it. ResNet-18, batch 128, 245 epochs, learning rate
0.5, weight decay 5e-4, T = 1e-3, no momentum, a sample of each of the last 50 epochs; cyclical rows: seven cycles, five
samples of each. Rows that are stored are not run again; a row that was interrupted goes on from its last checkpoint.

The published fixed point has 8 fraction bits for 8 bits, which clips batch-norm scales at 1/2, and the published blocks
clamp at every power of two (``bfp8-clamp``): both as published. ``bfp8`` are blocks that carry, this package's own.
SGHMC without augmentation stands beside "Parameter expanded SG-MCMC" (ICLR 2025), which has another network; the port
LP-SGLD-JAX samples in cycles.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rows import METHODS, Row
from run import RESULTS, environment, evaluated, remember, store, stored
from tables import Cell

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from image_classification import DATA, NETS, Images
from published import ScheduledClassifier

from lightning_lpsgld import EffectiveTemperature, LowPrecisionSGLD, SampleCollector
from lightning_lpsgld.samplers import SGHMC

__all__ = ["PUBLISHED", "ROWS", "main", "table"]

EPOCHS, CYCLES, PER_CYCLE, KEPT = 245, 7, 5, 50
LR, WEIGHT_DECAY, BATCH = 0.5, 5e-4, 128
#: Of the rows without augmentation: a time step of SGHMC, its friction, and a prior variance of 0.05 on N = 50,000.
PLAIN = {"lr": 0.1, "friction": 1.0, "weight_decay": 1 / (0.05 * 50_000), "samples": 100}


def _formats(weights: str | None, casts: str | None) -> dict[str, Any]:
    return {"weights": weights, "gradients": weights, "activations": casts, "errors": casts}


FORMATS = {
    "fp32": _formats(None, None),
    "fixed8.8": _formats("fixed8.8", None),
    "bfp8-clamp": _formats("bfp8-clamp", "bfp8-clamp"),
    "bfp8": _formats("bfp8", "bfp8"),
}
_LOW = ("naive-sgldlp-l", "vc-sgldlp-l", "sgdlp-l", "sgldlp-f", "sgdlp-f")
_CYCLICAL = ("vc-csgldlp-l", "csgldlp-f")
#: Method and format of every row, in the order of the paper's table; then ours; "sghmc-plain": without augmentation.
ROWS = (
    ("sgld", "fp32"), ("sgd", "fp32"), ("csgld", "fp32"),
    *((method, "fixed8.8") for method in _LOW),
    *((method, "bfp8-clamp") for method in (*_LOW, *_CYCLICAL)),
    *((method, "bfp8") for method in (*_LOW, *_CYCLICAL)),
    ("sghmc-plain", "fp32"),
)  # fmt: skip

#: Source, data, row, error and ECE in percent, NLL, as far as printed.
PUBLISHED = Path(__file__).parent / "published_cifar.csv"


# ------------------------------------------------------------------------------------------------------------ one row


def _plugin(row: Row) -> LowPrecisionSGLD:
    if row.method == "sghmc-plain":
        sampler = partial(SGHMC, friction=PLAIN["friction"])
        return LowPrecisionSGLD(**FORMATS[row.format], temperature=row.temperature, sampler=sampler)
    options = dict(METHODS[row.method])
    if "cycles" in options:
        options["cycles"] = CYCLES
    return LowPrecisionSGLD(**FORMATS[row.format], temperature=row.temperature, **options)


def _collector(row: Row, epochs: int, folder: Path) -> SampleCollector:
    """A sample of each of the last epochs; with cycles of the last epochs of each cycle."""
    if "csgld" in row.method:
        return SampleCollector(folder, per_cycle=min(PER_CYCLE, max(1, epochs // CYCLES)), every="epoch")
    kept = PLAIN["samples"] if row.method == "sghmc-plain" else KEPT
    return SampleCollector(folder, start=max(0.0, 1.0 - (kept + 0.5) / epochs), every="epoch")


def _module(row: Row, net: str) -> ScheduledClassifier:
    _, classes, channels, _, _ = DATA[row.data]
    plain = row.method == "sghmc-plain"
    lr, decay = (PLAIN["lr"], PLAIN["weight_decay"]) if plain else (LR, WEIGHT_DECAY)
    return ScheduledClassifier(NETS[net](channels, classes), lr, decay, decay="csgld" not in row.method and not plain)


def run_row(row: Row, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, or go on training, collect, evaluate on the test images.

    Args:
        row: Which.
        args: Of the command line.

    Returns:
        Rows of the last weights and of the ensemble, with the study's columns; ``seconds`` since the run was last taken
        up.
    """
    L.seed_everything(row.seed, verbose=False)
    folder = args.cache / row.name
    last = folder / "last.ckpt"
    if not last.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that did not come to a checkpoint
    data = Images(row.data, args.data_dir, batch_size=BATCH, limit=args.limit, workers=args.workers,
                  augment=row.method != "sghmc-plain")  # fmt: skip
    module, collector = _module(row, args.net), _collector(row, args.epochs, folder / "bank")
    plugin = _plugin(row)
    plugin.seed = row.seed
    checkpoints = ModelCheckpoint(folder, save_top_k=0, save_last=True, every_n_epochs=args.checkpoint_every)
    trainer = L.Trainer(
        max_epochs=args.epochs, plugins=[plugin], accelerator=args.accelerator, devices=1, logger=False,
        callbacks=[collector, EffectiveTemperature(every_n_steps=500, verdict=False), checkpoints],
        enable_progress_bar=args.progress, enable_model_summary=False,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    seconds = time.perf_counter() - began
    batches = list(data.test_dataloader())
    targets = torch.cat([y for _, y in batches])
    return evaluated(row, trainer, module, collector.bank, batches, targets, seconds)[0]


# ---------------------------------------------------------------------------------------------------------- the table


def _ours(path: Path, data: str) -> dict[str, list[dict[str, float]]]:
    """Method and format -> scores of every seed: of the last weights for SGD, of the ensemble else."""
    found: dict[str, list[dict[str, float]]] = {}
    if not path.exists():
        return found
    with path.open() as file:
        for entry in csv.DictReader(file):
            if entry["data"] == data and entry["of"] == ("last" if entry["method"].startswith("sgd") else "ensemble"):
                scores = {"error": 100 * float(entry["error"]), "ece": 100 * float(entry["ece_paper"])}
                row = f"{entry['method']}/{entry['format']}"
                found.setdefault(row, []).append(scores | {"nll": float(entry["nll"])})
    return found


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    cell = Cell(dict(enumerate(values)))
    return f"{cell.mean:.3f}" + ("" if len(values) == 1 else f" ± {cell.error:.3f}")


def table(path: Path, data: str) -> str:
    """Markdown: every row with our error, ECE (nine bins, as the paper's) and NLL, and the published ones beside.

    Args:
        path: Stored rows; a file that is not there has none.
        data: ``"cifar10"`` or ``"cifar100"``.
    """
    ours = _ours(path, data)
    with PUBLISHED.open() as file:
        printed = [entry for entry in csv.DictReader(file) if entry["data"] == data]
    lines = ["| row | seeds | error % | ECE % | NLL | published: error %, ECE %, NLL |", "|---" * 6 + "|"]
    for method, fmt in ROWS:
        name = f"{method}/{fmt}"
        runs = ours.get(name, [])
        shown = [_cell([run[score] for run in runs]) for score in ("error", "ece", "nll")]
        beside = [
            f"{entry['source']}: " + ", ".join(entry[score] or "-" for score in ("error", "ece", "nll"))
            for entry in printed
            if entry["row"] == name
        ]
        lines.append("| " + " | ".join([name, str(len(runs)), *shown, "; ".join(beside)]) + " |")
    return "\n".join(lines)


def arguments(command: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["cifar10", "cifar100"], default="cifar10")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="torchvision root")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD/FORMAT", help="only these rows")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--checkpoint-every", type=int, default=5, metavar="EPOCHS", help="how much may be lost")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--net", choices=NETS, default="resnet18")
    parser.add_argument("--limit", type=int, help="use only the first images (a quick look)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cifar.csv")
    parser.add_argument("--cache", type=Path, default=Path("runs/cifar"), help="checkpoints and banks of rows")
    return parser.parse_args(command)


def main(command: Sequence[str] | None = None) -> None:
    args = arguments(command)
    first = Row(args.data, args.limit or 50_000, "", "", 0.0, 0)
    for seed in range(0 if args.show else args.seeds):
        for method, fmt in ROWS:
            temperature = 0.0 if method.startswith("sgd") else 1.0 if method == "sghmc-plain" else 1e-3
            row = replace(first, method=method, format=fmt, temperature=temperature, seed=seed)
            key = (row.data, str(row.size), method, fmt, f"{temperature:.6g}", str(seed))
            if (args.only and f"{method}/{fmt}" not in args.only) or key in stored(args.out):
                continue
            store(args.out, run_row(row, args))
            configuration = {"epochs": args.epochs, "batch_size": BATCH, "net": args.net}
            remember(args.out, row.name, configuration | environment(args.accelerator))
            shutil.rmtree(args.cache / row.name)  # some hundred megabytes a row
            print(f"{row.name}: done", flush=True)
    print(table(args.out, args.data))


if __name__ == "__main__":
    main()
