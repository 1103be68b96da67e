"""Out of distribution and selective prediction: what a posterior's uncertainty is good for, from banks of the study.

::

    python examples/study/run.py --data-dir FOLDER --keep-banks       # the runs; their banks stay in the cache
    python examples/study/outliers.py --data-dir FOLDER               # outliers.csv, of every bank in the cache
    python examples/study/tables.py                                   # the tables

Trained on Fashion-MNIST, a network is shown handwritten digits (scikit-learn's, enlarged), noise (pixels uniform in
[0, 1]) and test images moved by ten pixels, five times as far as the augmentation moves them. Each of three scores says
how foreign an image is: one minus the largest mean probability, the entropy of the mean, and the mutual information,
which only an ensemble has. AUROC is of foreign against test images, FPR95 the share of foreign images that pass where
95 % of test images pass; AURC, of the test images alone, is the mean error rate over all coverages when images are
answered in the order of a score.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deep import replace
from fashion import NAMES, Fashion
from rows import Row, rows_of
from run import COLUMNS, RESULTS, Net
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.predictive import RunningPredictive, bayesian_model_average

__all__ = ["OUTLIER_COLUMNS", "aurc", "false_positives", "foreign_images", "outlier_rows", "scores_of_images"]

OUTLIER_COLUMNS = (*COLUMNS[:6], "of", "samples", "images", "score", "auroc", "fpr95", "aurc")
#: Networks of a deep ensemble of float32 SGD.
_DEEP = 4
_FOREIGN = 2_000
_MOVED = 10


def foreign_images(data: Fashion, count: int = _FOREIGN) -> dict[str, Tensor]:
    """Images that no network of the study was trained on, scaled as its data are.

    Args:
        data: After ``setup``.
        count: At most so many of each kind.

    Returns:
        Kind -> images, shape (n, 1, 28, 28).
    """
    low, high = data.background, data.background + 1 / data.spread
    digits = torch.from_numpy(load_digits().images[:count]).float().unsqueeze(1) / 16
    digits = torch.nn.functional.interpolate(digits, size=28, mode="bilinear", align_corners=False)
    noise = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    tested = data.test[0][:count].cpu()
    moved = torch.full_like(tested, low)
    moved[..., _MOVED:, _MOVED:] = tested[..., :-_MOVED, :-_MOVED]
    return {"digits": low + digits * (high - low), "noise": low + noise * (high - low), "moved": moved}


def scores_of_images(predictive: RunningPredictive) -> dict[str, Tensor]:
    """How foreign each image looks by three scores, shape (n,), larger is more foreign."""
    return {
        "confidence": 1.0 - predictive.probabilities.amax(1),
        "entropy": predictive.predictive_entropy,
        "mutual information": predictive.mutual_information,
    }


def false_positives(known: Tensor, foreign: Tensor, share: float = 0.95) -> float:
    """Share of foreign images that pass where ``share`` of known ones do (Liang et al., 2018, arXiv:1706.02690).

    Args:
        known: Scores of images of the distribution, shape (n,).
        foreign: Scores of the others, shape (m,).
        share: Of the known ones that must pass: those of the smallest scores.
    """
    threshold = torch.quantile(known.double(), share, interpolation="higher")
    return float((foreign.double() <= threshold).double().mean())


def aurc(scores: Tensor, wrong: Tensor) -> float:
    """Mean over k of the error rate among the k images of the smallest scores.

    Args:
        scores: Shape (n,).
        wrong: Whether the answer is wrong, shape (n,).
    """
    ranked = wrong.double()[scores.argsort(stable=True)]
    return float((ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)).mean())


def outlier_rows(common: dict[str, Any], bank: SampleBank, module: Net, data: Fashion) -> list[dict[str, Any]]:
    """The lines of one bank: of the test images for every score AURC, of every kind of foreign images the rest."""
    nan = float("nan")

    def looked_at(images: Tensor) -> RunningPredictive:
        loader = DataLoader(TensorDataset(images), 500)
        return bayesian_model_average(bank, module, loader, targets=lambda batch: None, metrics=None).predictive

    images, targets = data.test
    predictive = looked_at(images)
    known, wrong = scores_of_images(predictive), predictive.probabilities.argmax(1) != targets
    ensemble = len(bank) > 1
    names = [name for name in known if ensemble or name != "mutual information"]
    common = common | {"of": "ensemble" if ensemble else "last", "samples": len(bank)}
    lines = [
        common | {"images": "test", "score": n, "auroc": nan, "fpr95": nan, "aurc": aurc(known[n], wrong)}
        for n in names
    ]
    for kind, strange in foreign_images(data).items():
        foreign = scores_of_images(looked_at(strange))
        for name in names:
            both = torch.cat([known[name], foreign[name]])
            truth = torch.arange(len(both)) >= len(known[name])
            found = {
                "auroc": float(binary_auroc(_ranks(both), truth.int())),
                "fpr95": false_positives(known[name], foreign[name]), "aurc": nan,
            }  # fmt: skip
            lines.append({"images": kind, "score": name} | found)
    return [common | line for line in lines]


def _ranks(scores: Tensor) -> Tensor:
    """Scores as ranks in (0, 1], equal ones alike: torchmetrics would take values outside of [0, 1] for logits."""
    _, place = torch.unique(scores.double(), return_inverse=True)
    return (place + 1).double() / (place.max() + 1)


def banks_of(
    cache: Path, size: int, seeds: int, data: str = NAMES[0]
) -> Iterator[tuple[dict[str, Any], SampleBank, Net]]:
    """Every bank that runs left in a cache, and an ensemble of networks of float32 SGD if there are enough."""
    deep, module = SampleBank(), None
    for row in rows_of(size, seeds, data):
        folder = cache / row.name
        if not (folder / "last.safetensors").exists():
            continue
        module = Net(row, 1)
        common = {name: getattr(row, name) for name in COLUMNS[:6]}
        if row.method == "sgd":
            module.net.load_state_dict(load_file(folder / "last.safetensors"))
            single = SampleBank()
            single.add(module, step=0)
            if len(deep) < _DEEP:
                deep.add(module, step=len(deep))
            yield common, single, module
        else:
            yield common, SampleBank.open(folder / "bank"), module
    if len(deep) == _DEEP and module is not None:
        ensemble = Row(data, size, f"deep-ensemble-of-{_DEEP}", "fp32", 0.0, 0)
        yield {name: getattr(ensemble, name) for name in COLUMNS[:6]}, deep, module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--data", choices=NAMES, default=NAMES[0])
    parser.add_argument("--size", type=int, default=5_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=RESULTS / "outliers.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Fashion(args.data_dir, args.size, name=args.data)
    data.setup("test")
    banks = banks_of(args.cache, args.size, args.seeds, args.data)
    lines = [line for found in banks for line in outlier_rows(*found, data)]
    if not lines:
        raise SystemExit(f"{args.cache} holds no banks; run examples/study/run.py --keep-banks first.")
    written = [
        {name: f"{line[name]:.6g}" if isinstance(line[name], float) else str(line[name]) for name in OUTLIER_COLUMNS}
        for line in lines
    ]
    replace(args.out, {"data": args.data, "size": str(args.size)}, written)
    print(f"{len(lines)} lines in {args.out}")


if __name__ == "__main__":
    main()
