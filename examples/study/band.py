"""One short row of the study, and the band of its numbers over seeds: what a test runs again.

::

    python examples/study/band.py                                          # 16 short runs; rewrites the band of digits
    python examples/study/band.py --data fashion-mnist --data-dir FOLDER   # and of Fashion-MNIST

VC SGLDLP-L in 8-bit blocks at T = 1e-3 on 500 images for ten epochs, through ``run.py``: the network, the schedule,
the casts, the collector, the meter and the average of the study, in seconds. scikit-learn's digits, written as the four
archives of Fashion-MNIST, stand in for it where it is not at hand.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion import Fashion
from rows import Row
from run import RESULTS, environment, run_row
from scipy import stats

__all__ = ["FRESH", "MEASURED", "band_of", "measure", "outside", "write_digits"]

SIZE, TEST, EPOCHS = 500, 250, 10
#: Of the stored band, and of the runs that are compared with it.
SEEDS, FRESH = range(16), (1000, 1001)
#: What is compared: scores of the ensemble and of the last weights, and the effective temperature.
MEASURED = ("ensemble error", "ensemble nll", "last nll", "t_eff")


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 digits, three times as large, as the four archives of Fashion-MNIST."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.pad((15 * digits.images).astype(np.uint8).repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
    labels = digits.target.astype(np.uint8)
    for stem, chosen in (("train", slice(SIZE)), ("t10k", slice(SIZE, None))):
        for kind, values in (("images-idx3-ubyte", images[chosen]), ("labels-idx1-ubyte", labels[chosen])):
            head = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
            (folder / f"{stem}-{kind}.gz").write_bytes(gzip.compress(head + values.tobytes()))


def measure(folder: Path, seed: int) -> dict[str, float]:
    """Run the row once.

    Args:
        folder: Of the four archives.
        seed: Of weights, data order and sampler.

    Returns:
        :data:`MEASURED` and their values; errors as fractions, NLL in nats.
    """
    torch.set_num_threads(1)
    row = Row("band", SIZE, "vc-sgldlp-l", "bfp8", 1e-3, seed)
    (last, ensemble), _ = run_row(row, Fashion(folder, SIZE, test=TEST), EPOCHS)
    return dict(zip(MEASURED, (ensemble["error"], ensemble["nll"], last["nll"], ensemble["t_eff"])))


def band_of(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over runs of different seeds."""
    columns = {name: np.array([run[name] for run in runs]) for name in MEASURED}
    return {name: {"mean": float(x.mean()), "std": float(x.std(ddof=1)), "runs": len(x)} for name, x in columns.items()}


def outside(band: dict[str, dict[str, float]], runs: list[dict[str, float]], false_fail_rate: float) -> list[str]:
    """The values whose mean over new runs does not belong to the band (Student's prediction interval, Bonferroni).

    Args:
        band: Of :func:`band_of`.
        runs: New runs, of other seeds.
        false_fail_rate: Probability with which any value of unchanged code is named, where runs are normal about their
            mean.

    Returns:
        One line for every value outside; empty if all is well.
    """
    found = []
    for name, entry in band.items():
        mean = math.fsum(run[name] for run in runs) / len(runs)
        quantile = float(stats.t.isf(false_fail_rate / (2 * len(band)), entry["runs"] - 1))
        reach = quantile * entry["std"] * math.sqrt(1 / len(runs) + 1 / entry["runs"])
        if not abs(mean - entry["mean"]) <= reach:
            found.append(f"{name}: {mean:.5g}, expected {entry['mean']:.5g} within {reach:.2g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's idx archives")
    parser.add_argument("--out", type=Path, default=RESULTS / "band.json")
    args = parser.parse_args()
    if (args.data == "fashion-mnist") != (args.data_dir is not None):
        parser.error("--data-dir belongs to --data fashion-mnist, which needs it")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.data_dir or Path(temporary)
        if args.data == "digits":
            write_digits(folder)
        runs = []
        for seed in SEEDS:
            runs.append(measure(folder, seed))
            print(seed, *(f"{name} {value:.4f}" for name, value in runs[-1].items()), flush=True)
    stored: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    stored[args.data] = {"band": band_of(runs), "runs": runs, "environment": environment("cpu")}
    args.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
