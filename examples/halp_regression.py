"""HALP on synthetic linear regression: the figure, its numbers, and the speed of the 8-bit solver.

python examples/halp_regression.py              # both parts; figure and JSON in examples/results
python examples/halp_regression.py --part rates # 100 features, 1000 rows: who converges, who stalls (1 minute)
python examples/halp_regression.py --part speed # 430 MB of float32 data: 8-bit HALP against float32 SVRG (2 minutes)
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_lpsgld.linear import instruction_set, kernels, unavailable
from lightning_lpsgld.linear.solver import SolveReport, pack_rows, solve
from lightning_lpsgld.linear.state import LinearState
from lightning_lpsgld.samplers import HALP, SGLD, SVRG

LR, BATCH, STEPS = 0.3, 100, 35


class Regression:
    """|Xw - y|^2 / 2n in float64, gradients in closed form."""

    def __init__(self, rows: int = 1000, features: int = 100):
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, features, dtype=torch.float64, generator=draw)
        truth = torch.randn(features, dtype=torch.float64, generator=draw)
        self.y = self.x @ truth + 0.5 * torch.randn(rows, dtype=torch.float64, generator=draw)
        values = torch.linalg.eigvalsh(self.x.T @ self.x / rows)
        self.mu, self.condition = float(values[0]), float(values[-1] / values[0])

    def gradient(self, w: torch.Tensor, rows: Any = slice(None)) -> torch.Tensor:
        """Mean gradient over ``rows`` at ``w``."""
        x, y = self.x[rows], self.y[rows]
        return x.T @ (x @ w.detach() - y) / len(y)

    def norms(self, make: Callable[[list[nn.Parameter]], Any], epochs: int) -> list[float]:
        """Gradient norm at the start of each epoch."""
        w = nn.Parameter(torch.zeros(self.x.shape[1], dtype=torch.float64))
        opt, order, norms = make([w]), torch.Generator().manual_seed(1), []

        def evaluate(rows: Any = slice(None)) -> None:
            w.grad = self.gradient(w, rows)

        for _ in range(epochs):
            if not isinstance(opt, SGLD):
                opt.recentre(evaluate)
            norms.append(float(self.gradient(w).norm()))
            for _ in range(STEPS):
                rows = torch.randint(len(self.y), (BATCH,), generator=order)
                opt.step(lambda rows=rows: evaluate(rows))
        return norms


def optimizers(mu: float) -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    return {
        "SVRG": lambda p: SVRG(p, LR),
        "HALP, 8 bits": lambda p: HALP(p, LR, mu=mu),
        "HALP, 8 bits, gap a power of two": lambda p: HALP(p, LR, mu=mu, power_of_two=True),
        "HALP, 16 bits": lambda p: HALP(p, LR, mu=mu, word_length=16),
        "HALP, bfp8 offsets": lambda p: HALP(p, LR, mu=None, offset_format="bfp8"),
        "HALP, 3 bits": lambda p: HALP(p, LR, mu=mu, word_length=3, check_mu=False),
        "LP-SVRG, gap 1/16": lambda p: SVRG(p, LR, weight_format="fixed8.4"),
        "LP-SVRG, gap 1/32": lambda p: SVRG(p, LR, weight_format="fixed8.5"),
        "LP-SGD, gap 1/16": lambda p: SGLD(p, LR, num_data=1, temperature=0.0, weight_format="fixed8.4"),
    }


def rates(out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    problem = Regression()
    epochs, table = 41, {}
    figure, axes = plt.subplots(figsize=(7, 4.5))
    print(f"100 features, 1000 rows, condition {problem.condition:.2f}, batch {BATCH}, {STEPS} steps an epoch, lr {LR}")
    for name, make in optimizers(problem.mu).items():
        norms = problem.norms(make, epochs if "3 bits" not in name else 8)
        table[name] = norms
        rate = (norms[20] / norms[5]) ** (1 / 15) if len(norms) > 20 else norms[-1] / norms[-2]
        axes.semilogy(norms, label=name)
        print(f"{name:34s} rate {rate:.3f} an epoch, last / first gradient norm {norms[-1] / norms[0]:.1e}")
    axes.set(xlabel="epoch", ylabel="gradient norm", ylim=(1e-12, 1e3))
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "halp_regression.png", dpi=130)
    (out / "halp_regression.json").write_text(json.dumps(table, indent=1))


# ------------------------------------------------------------------------------------------------------------ speed


def grid_data(rows: int, features: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Features on the 8-bit grid, so that both solvers have the same problem; their deviations fall to ``spread``."""
    draw = np.random.default_rng(0)
    x, deviation = np.empty((rows, features), np.int8), np.geomspace(1, spread, features).astype(np.float32) * 28
    truth, y = draw.standard_normal(features).astype(np.float32) / 28, np.empty(rows, np.float32)
    for begin in range(0, rows, 8192):
        part = draw.standard_normal((min(8192, rows - begin), features), dtype=np.float32)
        x[begin : begin + 8192] = np.clip(np.rint(part * deviation), -127, 127)
        y[begin : begin + 8192] = x[begin : begin + 8192].astype(np.float32) @ truth
    return x, y + 0.5 * y.std() * draw.standard_normal(rows).astype(np.float32)


def print_draws(width: int, rows: int, batch: int) -> None:
    """Time of the rounding bits of an epoch, drawn alone: a word for each offset and each row of every mini-batch."""
    if unavailable() is None:
        words, seconds = (width + -(-batch // 64) * 64) * -(-rows // batch), []
        for _ in range(7):
            start = time.process_time()
            kernels.draw_words(words, step=0, stream=0, seed=0)
            seconds.append(time.process_time() - start)
        print(f"draws of an epoch: {words} words of 32 bits, {1e3 * min(seconds):.2f} ms")


def describe(each: list[tuple[SolveReport, float]], best: float) -> dict[str, float]:
    """Seconds, bandwidth, and epochs and seconds to shares of the first suboptimality."""
    seconds = np.array([r.seconds for r, _ in each])
    report, cpu, wall = each[0][0], min(c for _, c in each), float(seconds[:, -1].min())
    row = {"wall_best": wall, "wall_median": float(np.median(seconds[:, -1])), "cpu_best": cpu}
    row.update({"GB/s": report.bytes_read / wall / 1e9, "GB/s of cpu time": report.bytes_read / cpu / 1e9})
    for target in (1e-2, 1e-3, 1e-4):
        hit = [i for i, f in enumerate(report.objective) if f - best <= target * (report.objective[0] - best)]
        if hit:
            row.update({f"epochs to {target:g}": hit[0], f"seconds to {target:g}": float(seconds[:, hit[0]].min())})
    return row


def summarize(runs: dict[str, list[tuple[SolveReport, float]]], loss: str) -> dict[str, dict[str, float]]:
    best = min(r.objective[-1] for each in runs.values() for r, _ in each)
    table = {label: describe(each, best) for label, each in runs.items()}
    for label, row in table.items():
        print(f"{loss}, {label}", {k: round(v, 3) for k, v in row.items()})
    for threads in ("1 thread", "2 threads"):
        a, b = table[f"svrg, {threads}"], table[f"halp8, {threads}"]
        ratios = {k: round(a[k] / b[k], 2) for k in a if k in b and not k.startswith(("GB", "epochs"))}
        print(f"{loss}, svrg / halp8, {threads}: {ratios}")
    return table


def speed(out: Path, *, rows: int, features: int, spread: float, batch: int, epochs: int, repeats: int) -> None:
    print(f"{platform.processor() or platform.machine()}, kernels: {unavailable() or instruction_set()}")
    x, y = grid_data(rows, features, spread)
    packed = {}
    for name, low in (("svrg", False), ("halp8", True)):
        start = time.perf_counter()
        packed[name] = pack_rows(x, low=low, intercept=True)[0]
        print(f"{name:6s} data {packed[name].nbytes / 1e6:.0f} MB, packed in {time.perf_counter() - start:.2f} s")

    def run(name: str, loss: str, threads: int, draws: bool = True) -> tuple[SolveReport, float]:
        data, target = packed[name], y if loss == "squared" else np.where(y > 0, 1, -1).astype(np.float32)
        penalty, unit = np.full(data.shape[1], 1e-4), 1 / 127 if name == "halp8" else 1.0
        state = LinearState(data, target, loss, penalty, unit=unit)
        start = time.process_time()
        report = solve(state, batch=batch, max_iter=epochs, tol=0.0, threads=threads, draws=draws)
        return report, time.process_time() - start

    print_draws(packed["halp8"].shape[1], rows, batch)

    tables = {}
    for loss in ("squared", "logistic"):
        runs: dict[str, list[tuple[SolveReport, float]]] = {}
        for _, threads in product(range(repeats), (1, 2)):
            for name, draws in (("svrg", True), ("halp8", True), ("halp8", False)):
                label = f"{name}{'' if draws else ' without draws'}, {threads} thread{'s' * (threads > 1)}"
                runs.setdefault(label, []).append(run(name, loss, threads, draws))
        tables[loss] = summarize(runs, loss)
    (out / "halp_speed.json").write_text(json.dumps(tables, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("both", "rates", "speed"), default="both")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rows", type=int, default=104_858)
    parser.add_argument("--features", type=int, default=1023)
    parser.add_argument("--spread", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part in ("both", "rates"):
        rates(args.out)
    if args.part in ("both", "speed"):
        speed(
            args.out, rows=args.rows, features=args.features, spread=args.spread, batch=args.batch, epochs=args.epochs,
            repeats=args.repeats,
        )  # fmt: skip


if __name__ == "__main__":
    main()
