"""Run rows of the study, resumably: what is stored already is not run again.

::

    python examples/study/run.py --data-dir FOLDER --size 5000 --seeds 5          # the small study
    python examples/study/run.py --data-dir FOLDER --data fashion-mnist-plain    # without shifts and flips: it overfits
    python examples/study/run.py --data-dir FOLDER --size 5000 --only vc-sgldlp-l/bfp8   # one row
    python examples/study/run.py --data-dir FOLDER --accelerator cuda --jobs 12          # side by side on one GPU
    python examples/study/run.py --data-dir FOLDER --keep-banks                          # for outliers.py

``FOLDER`` holds Fashion-MNIST's four idx archives. Every run appends two rows to ``rows.csv`` (of the last weights and
of the ensemble) and leaves its predicted probabilities in ``--cache``, from which ensembles of several runs are made;
with ``--keep-banks`` the samples and the last weights, too. Several processes may share a study (``--jobs`` starts so
many): a run is claimed by a lock file in the cache, which a process that ends with an error or is interrupted takes
away again.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from fashion import NAMES, Fashion, resnet8
from rows import Row, decay, learning_rate, make_plugin, rows_of
from safetensors.torch import save_file
from scores import scores_of
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from billion_weights import machine

from lightning_lpsgld import EffectiveTemperature, SampleBank, SampleCollector
from lightning_lpsgld.predictive import bayesian_model_average

__all__ = ["COLUMNS", "EPOCHS", "evaluated", "run_row"]

COLUMNS = (
    "data", "size", "method", "format", "temperature", "seed", "of", "samples", "error", "nll", "calibrated_nll",
    "brier", "ece", "ece_paper", "t_eff", "seconds", "sample_mb",
)  # fmt: skip
#: Training images -> epochs: 2,000 steps a run in the small study, 3,600 in the large one.
EPOCHS = {5_000: 40, 60_000: 6}
WEIGHT_DECAY = 5e-4
RESULTS = Path(__file__).resolve().parents[1] / "results" / "study"


class Net(L.LightningModule):
    """A plain classifier with the row's schedule."""

    def __init__(self, row: Row, steps: int) -> None:
        super().__init__()
        self.net, self.row, self.steps = resnet8(), row, steps

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, 10)."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD with the schedule; the plugin takes over both."""
        optimizer = torch.optim.SGD(self.parameters(), lr=learning_rate(self.row), weight_decay=WEIGHT_DECAY)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(self.row, step / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _collector(row: Row, steps: int, bank: Path | None) -> SampleCollector:
    """Thirty samples of the last two fifths; with cycles seven of the last fifth of each of four."""
    if "csgld" in row.method:
        return SampleCollector(bank, per_cycle=7, every=max(1, steps // 4 // 5 // 7))
    return SampleCollector(bank, start=0.6, every=max(1, round(0.4 * steps / 30)))


def run_row(
    row: Row, data: Fashion, epochs: int, keep: Path | None = None
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Train, collect, evaluate on the test images.

    Args:
        row: What to run.
        data: On what.
        epochs: For how long.
        keep: Folder for the bank and the last weights; ``None``: they are not kept.

    Returns:
        The two rows of the table, and the probabilities of the last weights and of the ensemble, shape (n, 10).
    """
    L.seed_everything(row.seed, verbose=False)
    steps = epochs * (row.size // data.batch_size)
    module, collector = Net(row, steps), _collector(row, steps, None if keep is None else keep / "bank")
    meter = EffectiveTemperature(every_n_steps=max(1, steps // 20), verdict=False)
    plugin = make_plugin(row)
    plugin.num_data, plugin.seed = row.size, row.seed
    trainer = L.Trainer(
        max_epochs=epochs, plugins=[plugin], callbacks=[collector, meter], accelerator=data.device, devices=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, logger=False,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - began
    if keep is not None:
        save_file(module.net.state_dict(), keep / "last.safetensors")
    data.setup("test")
    batches, targets = list(data.test_dataloader()), data.test[1].cpu()
    return evaluated(row, trainer, module, collector.bank, batches, targets, seconds)


def evaluated(
    row: Row, trainer: L.Trainer, module: L.LightningModule, bank: SampleBank, batches: list[Any], targets: Tensor,
    seconds: float,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:  # fmt: skip
    """What a trained network and its bank say of the test images.

    Args:
        row: That was run.
        trainer: That ran it, with :class:`EffectiveTemperature`.
        module: With its last weights.
        bank: The samples.
        batches: Of test images and labels.
        targets: All labels, shape (n,).
        seconds: Of training.

    Returns:
        As :func:`run_row`.
    """
    module.to(trainer.strategy.root_device).eval()
    with torch.no_grad():
        last = torch.cat([module(x.to(module.device)).softmax(1) for x, _ in batches]).cpu()
    ensemble = bayesian_model_average(bank, module, batches).predictive.probabilities.cpu()
    ratio = float(trainer.callback_metrics.get("noise/achieved_over_target", torch.tensor(float("nan"))))
    common = {name: getattr(row, name) for name in COLUMNS[:6]}
    common |= {"t_eff": row.temperature * ratio, "seconds": seconds}
    each = bank.nbytes / 1e6 / len(bank)
    table = [
        common | {"of": of, "samples": count, "sample_mb": each * count} | scores_of(probabilities, targets)
        for of, count, probabilities in (("last", 1, last), ("ensemble", len(bank), ensemble))
    ]
    return table, {"last": last.numpy().astype(np.float32), "ensemble": ensemble.numpy().astype(np.float32)}


def stored(path: Path) -> set[tuple[str, ...]]:
    """The runs that a table holds already."""
    if not path.exists():
        return set()
    with path.open() as file:
        return {tuple(entry[name] for name in COLUMNS[:6]) for entry in csv.DictReader(file)}


def store(path: Path, table: list[dict[str, Any]]) -> None:
    """Append rows in one write; processes side by side take turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(_text(entry[name]) for name in COLUMNS) for entry in table]
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        head = "" if os.fstat(file.fileno()).st_size else ",".join(COLUMNS) + "\n"
        file.write(head + "\n".join(lines) + "\n")
        file.flush()


def remember(path: Path, name: str, where: dict[str, Any]) -> None:
    """Note beside the table how and where a run was made: every set of settings once, with the runs that had it.

    Args:
        path: The table.
        name: Of the run.
        where: Configuration, versions, machine and commit.
    """
    beside = path.with_suffix(".json")
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = json.loads(beside.read_text()) if beside.exists() else []
        for entry in known:
            entry["runs"] = [run for run in entry["runs"] if run != name]
        same = next((entry for entry in known if {k: v for k, v in entry.items() if k != "runs"} == where), None)
        if same is None:
            known.append(same := where | {"runs": []})
        same["runs"].append(name)
        beside.write_text(json.dumps([entry for entry in known if entry["runs"]], indent=1) + "\n")


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _claim(cache: Path, row: Row) -> bool:
    """Whether this process is the first to take the run."""
    try:
        os.close(os.open(_claim_of(cache, row), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _claim_of(cache: Path, row: Row) -> Path:
    return cache / f"{row.name}.claimed"


def _kept(cache: Path, row: Row) -> Path:
    """An empty folder for what a run leaves; of an attempt that came to nothing, nothing stays."""
    folder = cache / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def environment(accelerator: str) -> dict[str, str]:
    """Versions, machine and commit."""
    gpu = {"gpu": torch.cuda.get_device_name()} if accelerator == "cuda" else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parents[2])
    facts = {name: str(value) for name, value in machine().items()}
    cpu = f"{facts.pop('processor')} ({facts.pop('capability')})"
    return facts | {"cpu": cpu, "commit": commit.stdout.strip()} | gpu


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of Fashion-MNIST's idx archives")
    parser.add_argument("--data", choices=NAMES, default=NAMES[0], help="with shifts and flips, or plain")
    parser.add_argument("--size", type=int, default=5_000, help="training images")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="by default 40 for 5,000 images and 6 for 60,000")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD/FORMAT[/T]", help="only these rows")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after that time")
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="so many processes side by side")
    parser.add_argument("--test-images", type=int, help="only the first of them (a quick look)")
    parser.add_argument("--out", type=Path, default=RESULTS / "rows.csv")
    parser.add_argument("--cache", type=Path, default=Path("runs/study"))
    parser.add_argument("--keep-banks", action="store_true", help="leave samples and last weights in the cache")
    return parser.parse_args()


def side_by_side(jobs: int) -> int:
    """Run this command in several processes, each of one thread; the largest exit code."""
    command = [sys.executable, __file__, *sys.argv[1:], "--jobs=1"]
    workers = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(jobs)]
    return max(worker.wait() for worker in workers)


def main() -> None:
    args = arguments()
    if args.jobs > 1:
        raise SystemExit(side_by_side(args.jobs))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    epochs = args.epochs or EPOCHS[args.size]
    args.cache.mkdir(parents=True, exist_ok=True)
    data = Fashion(args.data_dir, args.size, test=args.test_images, device=args.accelerator, name=args.data)
    began, failed = time.monotonic(), []
    for row in rows_of(args.size, args.seeds, args.data):
        key = (*(str(getattr(row, name)) for name in COLUMNS[:4]), _text(row.temperature), str(row.seed))
        cell = f"{row.method}/{row.format}"
        wanted = not args.only or not {cell, f"{cell}/{row.temperature:g}"}.isdisjoint(args.only)
        if not wanted or key in stored(args.out) or time.monotonic() - began > 3600 * args.hours:
            continue
        if not _claim(args.cache, row):
            continue
        try:
            table, probabilities = run_row(row, data, epochs, _kept(args.cache, row) if args.keep_banks else None)
        except BaseException as error:
            _claim_of(args.cache, row).unlink()
            if not isinstance(error, Exception):
                raise
            failed.append(row.name)  # the other runs are not to suffer
            traceback.print_exc()
            continue
        np.savez_compressed(args.cache / f"{row.name}.npz", **probabilities)
        store(args.out, table)
        configuration = {"epochs": epochs, "batch_size": data.batch_size, "weight_decay": WEIGHT_DECAY}
        remember(args.out, row.name, configuration | environment(args.accelerator))
        summary = (f"{e['of']} {100 * e['error']:.2f} {e['nll']:.4f} {100 * e['ece']:.2f}" for e in table)
        print(row.name, *summary, flush=True)
    if failed:
        raise SystemExit(f"not run, for the reasons above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
