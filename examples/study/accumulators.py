"""What a low accumulator costs in block floating point, under either rule at the top of a block.

A perceptron with batch norm on scikit-learn's digits, all tensors in ``bfp8`` (weights, gradients, activations and
errors), T = 0: SGD with an 8-bit accumulator (SGD-L) against a full one (SGD-F), where blocks carry at the top and
where they clamp as published, and float32. Runs of one seed share initial weights and the order of the data, so that
differences are taken within a seed::

    python examples/study/accumulators.py            # minutes; JSON in examples/results/study
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from rows import paper_decay
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.tops import at_top
from lightning_lpsgld.samplers import SGLD

METHODS = {
    "float32": (None, "low"),
    "SGD-F, carrying": ("bfp8", "full"),
    "SGD-L, carrying": ("bfp8", "low"),
    "SGD-F, published": ("bfp8-clamp", "full"),
    "SGD-L, published": ("bfp8-clamp", "low"),
}
#: Difference of two methods; the gap between accumulators under each rule, and between rules with each accumulator.
GAPS = {
    "L - F, carrying": ("SGD-L, carrying", "SGD-F, carrying"),
    "L - F, published": ("SGD-L, published", "SGD-F, published"),
    "F - float32, carrying": ("SGD-F, carrying", "float32"),
    "published - carrying, SGD-F": ("SGD-F, published", "SGD-F, carrying"),
    "published - carrying, SGD-L": ("SGD-L, published", "SGD-L, carrying"),
}
BATCH = 64


def perceptron() -> nn.Sequential:
    """Two hidden layers of 64 units with batch norm."""
    hidden = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and which of them are for training: every third image is a test image."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y), torch.arange(len(y)) % 3 != 0


def run(fmt: str | None, accumulator: str, *, lr: float, epochs: int, seed: int) -> dict[str, float]:
    """Scores of the last weights of one run."""
    x, y, kept = data()
    train, targets = x[kept], y[kept]
    torch.manual_seed(seed)
    net, order = perceptron(), torch.Generator().manual_seed(seed)
    casting = None if fmt is None else ActivationCasting(net, fmt, fmt, seed=seed).attach()
    opt = SGLD(
        net.parameters(), lr, num_data=len(targets), temperature=0.0, weight_decay=5e-4, weight_format=fmt,
        gradient_format=fmt, accumulator=accumulator if fmt else "low", seed=seed, check_finite=False,
    )  # fmt: skip
    opt.round_parameters_()
    steps = epochs * (len(targets) // BATCH)
    for step in range(steps):
        if step % (len(targets) // BATCH) == 0:
            shuffled = torch.randperm(len(targets), generator=order)
        rows = shuffled[step % (len(targets) // BATCH) * BATCH :][:BATCH]
        opt.param_groups[0]["lr"] = lr * paper_decay(step / steps)
        opt.zero_grad()
        nn.functional.cross_entropy(net(train[rows]), targets[rows]).backward()
        opt.step()
    if casting is not None:
        casting.remove()
    return scores(net.eval(), x, y, kept)


@torch.no_grad()
def scores(net: nn.Module, x: Tensor, y: Tensor, kept: Tensor) -> dict[str, float]:
    """NLL of both sets, test error, and the share of batch-norm scales at the top code."""
    logits = net(x)
    each = nn.functional.cross_entropy(logits, y, reduction="none")
    wrong = logits.argmax(1) != y
    scales = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm1d)])
    standing = at_top(quantize(scales, "bfp8", rounding="nearest"), parse_format("bfp8"))
    return {
        "train NLL": float(each[kept].mean()),
        "test NLL": float(each[~kept].mean()),
        "test error %": 100 * float(wrong[~kept].double().mean()),
        "scales at the top %": 100 * float(standing.double().mean()),
    }


def summary(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(spread / len(values))


def tables(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Means and standard errors over seeds: of each method, and of each gap within seeds."""
    names = runs["float32"][0]
    out = {label: {name: summary([r[name] for r in rows]) for name in names} for label, rows in runs.items()}
    for label, (a, b) in GAPS.items():
        out[label] = {name: summary([p[name] - q[name] for p, q in zip(runs[a], runs[b])]) for name in names}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "study")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, object]] = {}
    runs: dict[float, dict[str, list[dict[str, float]]]] = {lr: {label: [] for label in METHODS} for lr in args.lr}
    for seed in range(args.seeds):
        for lr in args.lr:
            for label, (fmt, accumulator) in METHODS.items():
                runs[lr][label].append(run(fmt, accumulator, lr=lr, epochs=args.epochs, seed=seed))
            results[f"lr {lr:g}"] = {"seeds": seed + 1, "mean, standard error": tables(runs[lr]), "runs": runs[lr]}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "accumulators.json").write_text(json.dumps(results, indent=1))
    for lr in args.lr:
        print(f"lr {lr:g}, {args.seeds} seeds, {args.epochs} epochs")
        for label, row in tables(runs[lr]).items():
            print(f"{label:30s}", *(f"{name} {mean:.4f} ± {error:.4f}" for name, (mean, error) in row.items()))


if __name__ == "__main__":
    main()
