"""Deep ensembles of the study's float32 SGD networks, and how many of them a posterior is worth.

::

    python examples/study/run.py --data-dir FOLDER --only sgd/fp32 --seeds 8     # the networks
    python examples/study/deep.py --data-dir FOLDER                              # deep_ensembles.csv

An ensemble of m is scored over several choices of m of the networks; ``tables.py`` reads off how many independent
networks have the calibrated log likelihood of a row (Ashukha et al., 2020, arXiv:2002.06470, section 5).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from fashion import NAMES, Fashion
from rows import Row
from scores import scores_of
from torch import Tensor

__all__ = ["deep_ensembles", "replace"]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "study"
#: Choices of members over which an ensemble's scores are averaged.
_CHOICES = 8


def deep_ensembles(members: Tensor, targets: Tensor, choices: int = _CHOICES) -> list[dict[str, float]]:
    """Scores of ensembles of 1 to all networks.

    Args:
        members: Probabilities, shape (networks, n, classes).
        targets: Labels, shape (n,).
        choices: Random choices of members of each size; every network once for ensembles of one.

    Returns:
        One dictionary a size: ``members`` and the mean scores.
    """
    generator = torch.Generator().manual_seed(0)
    table = []
    for size in range(1, len(members) + 1):
        sets = [torch.randperm(len(members), generator=generator)[:size] for _ in range(choices)]
        if size == 1:
            sets = list(torch.arange(len(members)).unsqueeze(1))
        elif size == len(members):
            sets = sets[:1]
        found = [scores_of(members[chosen].double().mean(0), targets) for chosen in sets]
        table.append({"members": float(size)} | {name: sum(f[name] for f in found) / len(found) for name in found[0]})
    return table


def replace(path: Path, here: dict[str, str], lines: list[dict[str, str]]) -> None:
    """Write the lines of one study into a table of several.

    Args:
        path: The table; made if it is not there.
        here: Columns and values that tell the study's lines from those of others.
        lines: What stands in the table of this study from now on.
    """
    others = []
    if path.exists():
        with path.open() as file:
            others = [entry for entry in csv.DictReader(file) if any(entry[k] != v for k, v in here.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows([*others, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--data", choices=NAMES, default=NAMES[0])
    parser.add_argument("--size", type=int, default=5_000)
    parser.add_argument("--cache", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=RESULTS / "deep_ensembles.csv")
    args = parser.parse_args()
    data = Fashion(args.data_dir, args.size)
    data.setup("test")
    paths = [args.cache / f"{Row(args.data, args.size, 'sgd', 'fp32', 0.0, s).name}.npz" for s in range(100)]
    members = [torch.from_numpy(np.load(path)["last"]) for path in paths if path.exists()]
    if not members:
        raise SystemExit(f"{args.cache} has no run of sgd/fp32; run examples/study/run.py --only sgd/fp32 first.")
    table = deep_ensembles(torch.stack(members), data.test[1].cpu())
    here = {"data": args.data, "size": str(args.size)}
    lines = [here | {name: f"{value:.6g}" for name, value in entry.items()} for entry in table]
    replace(args.out, here, lines)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
