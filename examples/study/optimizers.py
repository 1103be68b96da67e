"""Two claims about low-precision optimization on small deep networks, with seeds and intervals.

* *HALP converges where low-precision SGD and SVRG stall* (De Sa et al., 2018): training objective of a perceptron with
  two hidden layers, on digits and on 5,000 images of Fashion-MNIST, all with 8 bits and one learning rate.
* *Gradient shrinkage slows SGD in proportion, and compensation takes it back* (Yun, 2025): gradients in fixed point of
  8 to 4 bits with one gap, so that each bit less halves the range; steps to a given loss against the share q of the
  gradient that is left.

::

    python examples/study/optimizers.py [--data-dir FOLDER]   # optimizers.json and the tables (8 minutes on digits)

``FOLDER`` holds Fashion-MNIST's archives; without it digits alone are run. What is stored is not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from tables import Cell
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import GradientShrinkage, LowPrecisionSGLD
from lightning_lpsgld.samplers import HALP, SVRG

__all__ = ["SOLVERS", "interval", "log_ratio", "perceptron", "shrinkage", "solve"]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "study"
WEIGHT_DECAY, WIDTH = 1e-3, 64
#: Nothing rounds but what a row names; optimization, not sampling.
_PLAIN: dict[str, Any] = {"weights": None, "gradients": None, "activations": None, "errors": None, "temperature": 0.0}
#: Name -> arguments of the plugin.
SOLVERS: dict[str, dict[str, Any]] = {
    "SGD, float32": {},
    "LP-SGD, fixed8.6": {"weights": "fixed8.6"},
    "LP-SGD, bfp8": {"weights": "bfp8"},
    "SVRG, float32": {"sampler": SVRG},
    "LP-SVRG, fixed8.6": {"sampler": functools.partial(SVRG, weight_format="fixed8.6")},
    "LP-SVRG, bfp8": {"sampler": functools.partial(SVRG, weight_format="bfp8")},
    "HALP, 8 bits": {"sampler": functools.partial(HALP, mu=None, offset_format="bfp8")},
}
#: Fraction bits of the gradients' fixed point: 8 bits of it hold nearly all gradients of the perceptron on digits.
_FRACTION_BITS = 12


def perceptron(inputs: int) -> nn.Sequential:
    """Two hidden layers of 64 and ten classes."""
    layers = [nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)]
    return nn.Sequential(*layers)


class Whole(TensorDataset):
    """Examples that are fetched a batch at a time; see :func:`loader`."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """A batch, by one index of each tensor."""
        return tuple(tensor[indices] for tensor in self.tensors)


def loader(data: Whole, batch_size: int) -> DataLoader:
    """Shuffled batches; in order where one batch is all of the data."""
    return DataLoader(data, batch_size, shuffle=batch_size < len(data), collate_fn=_as_it_is)


def _as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch


def digits() -> Whole:
    """1,797 images of 64 pixels in [0, 1]."""
    inputs, targets = load_digits(return_X_y=True)
    return Whole(torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(targets))


def fashion(folder: Path, size: int = 5_000) -> Whole:
    """Fashion-MNIST's first images, standardized and flattened."""
    from fashion import Fashion

    data = Fashion(folder, size, test=1)
    data.setup("fit")
    return Whole(data.train[0].flatten(1), data.train[1])


class Module(L.LightningModule):
    """Cross entropy, SGD; remembers the loss of every step."""

    def __init__(self, inputs: int, lr: float) -> None:
        super().__init__()
        self.net, self.lr = perceptron(inputs), lr
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean cross entropy."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, of which the sampler takes the learning rate and the weight decay."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=WEIGHT_DECAY)


def fit(data: Whole, options: dict[str, Any], seed: int, *, lr: float, epochs: int, batch_size: int,
        callbacks: list[L.Callback] | None = None) -> Module:  # fmt: skip
    """One run in the Trainer."""
    L.seed_everything(seed, verbose=False)
    module = Module(data.tensors[0].shape[1], lr)
    trainer = L.Trainer(
        max_epochs=epochs, plugins=[LowPrecisionSGLD(**{**_PLAIN, **options}, seed=seed)], callbacks=callbacks,
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(data, batch_size))
    return module


def end(module: Module, data: Whole) -> tuple[float, float]:
    """What every solver minimizes, mean cross entropy and weight decay over all data, and its gradient's length."""
    parameters = list(module.parameters())
    loss = nn.functional.cross_entropy(module.net(data.tensors[0]), data.tensors[1])
    loss = loss + WEIGHT_DECAY / 2 * sum(p.square().sum() for p in parameters)
    grads = torch.autograd.grad(loss, parameters)
    return float(loss.detach()), math.sqrt(sum(float(g.square().sum()) for g in grads))


def solve(data: Whole, seeds: int, epochs: int, lr: float = 0.2) -> dict[str, dict[str, list[float]]]:
    """Objective and length of its gradient at the end, lists over the seeds, of every solver.

    Weights and order of the data are those of the seed, whatever the solver.
    """
    results: dict[str, dict[str, list[float]]] = {}
    for name, options in SOLVERS.items():
        ends = [end(fit(data, options, s, lr=lr, epochs=epochs, batch_size=100), data) for s in range(seeds)]
        results[name] = {"objective": [value for value, _ in ends], "gradient": [norm for _, norm in ends]}
    return results


class Share(L.Callback):
    """The share of the squared gradient that clipping to a format's range leaves, of every step."""

    def __init__(self, limit: float) -> None:
        self.limit, self.shares = limit, [0.0] * 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Expected rounded gradient times gradient, over its squared length, all parameters together."""
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        left = sum(float((g.clamp(-self.limit, self.limit) * g).sum()) for g in grads)
        self.shares.append(left / sum(float(g.square().sum()) for g in grads))


def shrinkage(data: Whole, bits: int | None, seed: int, compensate: bool, *, loss: float = 0.5, lr: float = 0.1,
              most: int = 3_000) -> dict[str, float]:  # fmt: skip
    """Full-batch SGD, gradients in fixed point of so many bits (``None``: not rounded): steps to a loss, and mean q."""
    fmt = None if bits is None else f"fixed{bits}.{_FRACTION_BITS}"
    limit = math.inf if bits is None else (2.0 ** (bits - 1) - 1) / 2**_FRACTION_BITS
    share = Share(limit)
    callbacks: list[L.Callback] = [share, _Until(loss)]
    if compensate:
        callbacks.append(GradientShrinkage(every_n_steps=1, threshold=0.0, compensate=True, q_floor=0.01))
    module = fit(data, {"gradients": fmt}, seed, lr=lr, epochs=most, batch_size=len(data), callbacks=callbacks)
    steps = len(module.losses)
    return {"steps": steps, "q": sum(share.shares) / len(share.shares), "reached": module.losses[-1] <= loss}


class _Until(L.Callback):
    """Ends the run at a loss."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """After every step."""
        trainer.should_stop |= pl_module.losses[-1] <= self.loss


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student) of values over seeds."""
    cell = Cell(dict(enumerate(values)))
    return cell.mean, cell.mean - cell.reach, cell.mean + cell.reach


def log_ratio(results: dict[str, dict[str, list[float]]], name: str, reference: str = "HALP, 8 bits") -> list[float]:
    """Logarithm (base 10) of a solver's last gradient over the reference's, seed by seed."""
    pairs = zip(results[name]["gradient"], results[reference]["gradient"])
    return [math.log10(value / other) for value, other in pairs]


def _print_solvers(where: str, results: dict[str, dict[str, list[float]]]) -> None:
    print(f"\n{where}\n\n| solver | objective | length of the gradient | over HALP's (95 %) |\n|---|---|---|---|")
    for name, row in results.items():
        objective, norm = (sum(values) / len(values) for values in row.values())
        mean, low, high = (10**value for value in interval(log_ratio(results, name)))
        print(f"| {name} | {objective:.5f} | {norm:.2e} | {mean:.3g} [{low:.3g}, {high:.3g}] |")


def _print_shrinkage(rows: list[dict[str, Any]]) -> None:
    print("\n| gradients | q | steps over float32's | 1/q | compensated |\n|---|---|---|---|---|")
    for row in rows:
        slow, fast = (interval(row[kind]) for kind in ("slowdown", "compensated"))
        shown = [f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in (slow, fast)]
        mean_q = sum(row["q"]) / len(row["q"])
        print(f"| {row['format']} | {mean_q:.3f} | {shown[0]} | {1 / mean_q:.2f} | {shown[1]} |")


def shrinkage_rows(data: Whole, seeds: int) -> list[dict[str, Any]]:
    """Formats of 8 to 4 bits: q, and steps relative to those of gradients that are not rounded, seed by seed."""
    reference = [shrinkage(data, None, seed, False)["steps"] for seed in range(seeds)]
    rows = []
    for bits in (8, 7, 6, 5, 4):
        plain, back = ([shrinkage(data, bits, s, on) for s in range(seeds)] for on in (False, True))
        rows.append({
            "format": f"fixed{bits}.{_FRACTION_BITS}", "q": [r["q"] for r in plain],
            "slowdown": [r["steps"] / n for r, n in zip(plain, reference)],
            "compensated": [r["steps"] / n for r, n in zip(back, reference)],
            "reached": all(r["reached"] for r in (*plain, *back)),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's idx archives")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100, help="of the solvers on digits; a third on Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizers.json")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning_lpsgld").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    parts: dict[str, Any] = {
        "shrinkage": lambda: shrinkage_rows(digits(), args.seeds),
        "digits": lambda: solve(digits(), args.seeds, epochs=args.epochs),
    }
    if args.data_dir is not None:
        parts["fashion-mnist"] = lambda: solve(fashion(args.data_dir), args.seeds, epochs=args.epochs // 3, lr=0.05)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name, run in parts.items():
        if name not in results:  # what is stored is not run again
            results[name] = run()
            results |= {"torch": torch.__version__, "lightning": L.__version__}
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        (_print_shrinkage if name == "shrinkage" else functools.partial(_print_solvers, name))(results[name])


if __name__ == "__main__":
    main()
