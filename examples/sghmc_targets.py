"""Low-precision SGLD and SGHMC on the targets of the SGHMC paper and on two-dimensional ones: who is nearer, and why.

python examples/sghmc_targets.py                  # all parts; JSON, CSV, figure in examples/results (7 minutes)
python examples/sghmc_targets.py --part published # all methods on four targets, at the paper's settings
python examples/sghmc_targets.py --part coarse    # the same on a grid four times coarser
python examples/sghmc_targets.py --part steps     # W2 of VC over naive SGHMC against the noise in units of the grid

The paper's are the two 1-D targets at ``fixed8.4``; the 2-D targets and the settings on ``fixed8.2`` are ours. Every
element of one tensor is an independent chain that starts in the target; numbers are those of all chains after a
burn-in, standard errors come from leaving out one of sixteen groups of chains at a time. docs/theory.md discusses them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixture_targets import Target
from torch import Tensor

from lightning_lpsgld.analysis import wasserstein2
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.flow import exact_flow
from lightning_lpsgld.random import DrawKey, normals
from lightning_lpsgld.samplers import SGHMC, SGLD

GROUPS, DIRECTIONS, CELL = 16, 8, 1 / 256
BURN_IN, EVERY = 10.0, 5  # units of time, steps


@dataclass(frozen=True)
class Setting:
    """Formats and steps. SGLD and SGHMC have the same step size where it is the paper's."""

    label: str
    fmt: str
    sghmc_lr: float
    sgld_lr: float
    inverse_mass: float
    friction: float = 3.0


GAUSSIAN = Target("1-D Gaussian", "paper", ((0.0,),), ((1.0,),))
MIXTURE = Target("1-D mixture", "paper", ((-1.0,), (1.0,)), ((0.25,),))
CORRELATED = Target("2-D Gaussian, correlation 0.8", "ours", ((0.0, 0.0),), ((1.0, 0.8), (0.8, 1.0)))
_R = math.sqrt(2.0)
# The paper's mixture times itself, turned by 45 degrees, so that its axes are not those of the grid.
FOUR_MODES = Target("2-D mixture, four modes", "ours", ((_R, 0.0), (-_R, 0.0), (0.0, _R), (0.0, -_R)),
                    ((0.25, 0.0), (0.0, 0.25)))  # fmt: skip
PUBLISHED = {
    2.0: Setting("published", "fixed8.4", 0.09, 0.09, 2.0),
    1.0: Setting("published", "fixed8.4", 0.1, 0.1, 1.0),
}
# A grid four times coarser, on which rounding shows. VC reaches SGHMC's noise there with steps twice as long only.
COARSE = {2.0: Setting("coarse", "fixed8.2", 0.2, 0.09, 2.0), 1.0: Setting("coarse", "fixed8.2", 0.25, 0.1, 1.0)}
CASES = [
    (target, settings[u])
    for settings in (PUBLISHED, COARSE)
    for target, u in ((GAUSSIAN, 2.0), (MIXTURE, 1.0), (CORRELATED, 2.0), (FOUR_MODES, 1.0))
]
NOT_ROUNDED = "float"
ACCUMULATION = {"-F": {"accumulator": "full"}, "naive -L": {"variance_corrected": False}, "VC -L": {}}
#: Last values of the paper's curves of the L2 distance on the mixture, read off the figure.
PAPER_L2 = {"SGLD-F": 0.07, "SGLD naive -L": 0.12, "SGLD VC -L": 0.12, "SGHMC-F": 0.01, "SGHMC naive -L": 0.09,
            "SGHMC VC -L": 0.04}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ chains


def make_sampler(param: Tensor, family: str, form: str, setting: Setting, drift: str, seed: int) -> Any:
    """The optimizer of a method: gradients and, but for -F, velocities are on the grid of the weights too."""
    options: dict[str, Any] = {"num_data": 1, "seed": seed}
    if form != NOT_ROUNDED:
        options |= {"weight_format": setting.fmt, "gradient_format": setting.fmt, **ACCUMULATION[form]}
    if family == "SGLD":
        return SGLD([param], setting.sgld_lr, **options)
    if form in ("naive -L", "VC -L"):
        options |= {"velocity_format": setting.fmt, "rescale_velocity": False}
    friction, u = setting.friction, setting.inverse_mass
    opt = SGHMC([param], setting.sghmc_lr, friction=friction, inverse_mass=u, drift=drift, **options)
    opt.velocity_of(param).copy_(u**0.5 * normals(param.shape, DrawKey(seed, stream=9)).float())
    return opt


@dataclass
class Sampled:
    """What is kept of a run, per group of chains: histograms along every direction, scatter, second moments."""

    cell: float
    directions: Tensor
    histograms: Tensor  # (groups, directions, cells)
    scatter: Tensor  # (groups,)
    second: Tensor  # (groups, d, d)


def unit_vectors(dim: int) -> Tensor:
    """The line, or equally spaced directions of the plane (not along the axes, where the grid would show)."""
    if dim == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    angle = math.pi * (torch.arange(DIRECTIONS, dtype=torch.float64) + 0.5) / DIRECTIONS
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def histograms(x: Tensor, directions: Tensor, cell: float) -> Tensor:
    """Counts of the projections in cells of width ``cell`` about its multiples from -8 to 8, per group of chains."""
    half = round(8 / cell)
    code = ((x.double() @ directions.T) / cell).round().clamp(-half, half).long() + half
    size, runs = 2 * half + 1, len(directions)
    group = torch.arange(len(x)) * GROUPS // len(x)
    flat = (group[:, None] * runs + torch.arange(runs)) * size + code
    return torch.bincount(flat.flatten(), minlength=GROUPS * runs * size).reshape(GROUPS, runs, size).double()


def per_group(values: Tensor) -> Tensor:
    return values.reshape(GROUPS, -1, *values.shape[1:]).mean(1)


def sample(
    target: Target, setting: Setting, family: str, form: str, *, chains: int, duration: float, drift: str = "corrected",
    seed: int = 0,
) -> Sampled:  # fmt: skip
    """Run chains from the target over ten units of time, then keep every fifth step of a ``duration``.

    What is not on the grid (a full accumulator, a weight that is not rounded) counts for W2 and L2 at the nearest point
    of the grid, so that every method has the same floor of W2, gap / sqrt(12).
    """
    param = torch.nn.Parameter(target.draw(chains, seed))
    opt = make_sampler(param, family, form, setting, drift, seed + 1)
    opt.round_parameters_()
    lr = setting.sghmc_lr if family == "SGHMC" else setting.sgld_lr
    burn, keep = math.ceil(BURN_IN / lr), math.ceil(duration / lr)
    directions = unit_vectors(target.dim)
    cell = parse_format(setting.fmt).gap if target.dim == 1 else CELL
    counts, scatter, second, taken = torch.zeros(()), torch.zeros(GROUPS), torch.zeros(()), 0
    for step in range(burn + keep):
        param.grad = target.gradient(param.detach())
        opt.step()
        if step >= burn and step % EVERY == 0:
            x = opt.state[param].get("accumulator", param.detach())
            scatter, taken = scatter + per_group(target.scatter(x)), taken + 1
            second = second + per_group(x.double()[:, :, None] * x.double()[:, None])
            counts = counts + histograms(quantize(x, setting.fmt, rounding="nearest"), directions, cell)
    return Sampled(cell, directions, counts, scatter / taken, second / taken)


# ---------------------------------------------------------------------------------------------------------- distances


def w2(target: Target, run: Sampled, groups: list[int]) -> float:
    """W2 to the target in one dimension; sliced W2 (root mean square over directions) in two."""
    half, total = run.histograms.shape[-1] // 2, 0.0
    grid = run.cell * torch.arange(-half, half + 1, dtype=torch.float64)
    for k, direction in enumerate(run.directions):
        counts = run.histograms[groups, k].sum(0)
        total += wasserstein2(grid, counts, target.quantile(direction), points=20_000) ** 2
    return (total / len(run.directions)) ** 0.5


def l2(target: Target, run: Sampled, groups: list[int]) -> float:
    """L2 distance of the density on the cells of the grid from the target's there; 1-D only."""
    counts = run.histograms[groups, 0].sum(0)
    half = len(counts) // 2
    edges = run.cell * (torch.arange(-half, half + 2, dtype=torch.float64) - 0.5)
    expected = target.cdf(run.directions[0], edges).diff()
    return float(((counts / counts.sum() - expected).square().sum() / run.cell).sqrt())


def axes_ratio(target: Target, run: Sampled, groups: list[int]) -> list[float]:
    """Second moment along the target's principal axes, narrow first, over the target's own."""
    whole = target.cov + target.means.T @ target.means / len(target.means)
    values, vectors = torch.linalg.eigh(whole)
    found = (vectors.T @ run.second[groups].mean(0) @ vectors).diagonal()
    return (found / values).tolist()


def jackknife(statistic: Callable[[list[int]], float]) -> tuple[float, float]:
    """A statistic of all groups, and its standard error from those that lack one group each."""
    whole = list(range(GROUPS))
    parts = np.array([statistic(whole[:g] + whole[g + 1 :]) for g in whole])
    return statistic(whole), float(((GROUPS - 1) * parts.var()) ** 0.5)


def describe(target: Target, run: Sampled, exact: Sampled) -> dict[str, Any]:
    """Distances of a run, and its excess over the one without rounding, with their standard errors."""
    row: dict[str, Any] = {}
    row["spread"], row["spread_se"] = jackknife(lambda g: float(run.scatter[g].mean()) / target.expected_scatter)
    row["excess"], row["excess_se"] = jackknife(
        lambda g: float((run.scatter - exact.scatter)[g].mean()) / target.expected_scatter
    )
    row["w2"], row["w2_se"] = jackknife(lambda g: w2(target, run, g))
    if target.dim == 1:
        row["l2"], row["l2_se"] = jackknife(lambda g: l2(target, run, g))
    for axis in range(target.dim):
        pair = jackknife(lambda g, axis=axis: axes_ratio(target, run, g)[axis])
        row[f"axis{axis}"], row[f"axis{axis}_se"] = pair
    return row


# --------------------------------------------------------------------------------------------------------------- parts


def targets(label: str, **options: Any) -> list[dict[str, Any]]:
    """All methods on all targets; on the published ones also the drift as printed, and SGLD at SGHMC's pace."""
    rows = []
    for target, base in (case for case in CASES if case[1].label == label):
        runs = [("SGLD", "", base), ("SGHMC", "corrected", base)]
        if (target.source, label) == ("paper", "published"):
            slow = base.sghmc_lr * base.inverse_mass / base.friction  # same relaxation per step as SGHMC
            runs += [("SGHMC", "paper", base), ("SGLD", "", replace(base, label="equal clock", sgld_lr=slow))]
        for family, drift, setting in runs:
            exact = None
            for form in (NOT_ROUNDED, *ACCUMULATION):
                run = sample(target, setting, family, form, drift=drift, **options)
                exact = exact or run
                row = {"target": target.name, "source": target.source, "setting": setting.label, "format": setting.fmt}
                row |= {"method": method(family, form), "drift": drift}
                rows.append(row | describe(target, run, exact))
                print(line(rows[-1]), flush=True)
    return rows


def method(family: str, form: str) -> str:
    """Name of a method: SGLD-F, SGHMC naive -L, ..."""
    return family + form if form == "-F" else f"{family} {form}"


def line(row: dict[str, Any]) -> str:
    """A row of the table in docs/theory.md."""
    sign = ", drift as printed" if row["drift"] == "paper" else ""
    keys = ("spread", "excess", "w2", "l2")
    cells = [f"{row[key]:.4f} ± {row[key + '_se']:.4f}" if key in row else "" for key in keys]
    return f"| {row['target']} | {row['setting']} | {row['method']}{sign} | " + " | ".join(cells) + " |"


def position_noise(setting: Setting) -> float:
    """Var xi_x over a quarter of the squared gap."""
    gap = parse_format(setting.fmt).gap
    return 4 * exact_flow(setting.sghmc_lr, setting.friction, setting.inverse_mass).var_x / gap**2


def lr_for(ratio: float, setting: Setting) -> float:
    """Step size at which :func:`position_noise` is ``ratio``, by bisection on its logarithm."""
    low, high = 1e-3, 1.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        at = Setting("", setting.fmt, middle, middle, setting.inverse_mass)
        low, high = (middle, high) if position_noise(at) < ratio else (low, middle)
    return math.sqrt(low * high)


def sweep(name: str) -> list[Setting]:
    """Settings of the 1-D Gaussian over the noise: by the step size on the published grid, or by the grid."""
    if name == "grids":
        return [Setting(name, f"fixed{f + 4}.{f}", 0.09, 0.09, 2.0) for f in range(2, 7)]
    steps = [lr_for(goal, PUBLISHED[2.0]) for goal in (0.1, 0.3, 1.0, 2.45, 5.0, 10.0, 20.0, 40.0, 80.0)]
    return [Setting(name, "fixed8.4", lr, lr, 2.0) for lr in steps]


def ratio(label: str, **options: Any) -> list[dict[str, Any]]:
    """W2 of VC over that of naive on the 1-D Gaussian."""
    rows = []
    drift = "paper" if label == "steps, drift as printed" else "corrected"
    for setting in sweep(label):
        vc, naive = (sample(GAUSSIAN, setting, "SGHMC", form, drift=drift, **options) for form in ("VC -L", "naive -L"))
        row: dict[str, Any] = {"sweep": label, "format": setting.fmt, "lr": setting.sghmc_lr}
        row["noise"] = position_noise(setting)
        row["vc_w2"], row["naive_w2"] = (w2(GAUSSIAN, run, list(range(GROUPS))) for run in (vc, naive))
        row["vc_spread"], row["naive_spread"] = (float(run.scatter.mean()) for run in (vc, naive))
        row["ratio"], row["ratio_se"] = jackknife(
            lambda g, vc=vc, naive=naive: w2(GAUSSIAN, vc, g) / w2(GAUSSIAN, naive, g)
        )
        rows.append(row)
        print(f"{label:23s} {setting.fmt} lr {row['lr']:.4f} noise {row['noise']:7.2f}  "
              f"spread {row['vc_spread']:.4f} / {row['naive_spread']:.4f}  W2 {row['vc_w2']:.4f} / "
              f"{row['naive_w2']:.4f} = {row['ratio']:.3f} ± {row['ratio_se']:.3f}", flush=True)  # fmt: skip
    return rows


SWEEPS = ("steps", "steps, drift as printed", "grids")
PARTS = {label: partial(targets, label) for label in ("published", "coarse")}
PARTS |= {label: partial(ratio, label) for label in SWEEPS}


# -------------------------------------------------------------------------------------------------------------- output


def bars(axis: Any, heights: dict[str, list[float]], errors: dict[str, list[float]], ticks: list[str]) -> None:
    """Groups of bars, one bar per method."""
    width = 0.8 / len(heights)
    for k, (name, height) in enumerate(heights.items()):
        place = np.arange(len(ticks)) + width * (k - (len(heights) - 1) / 2)
        axis.bar(place, height, width, yerr=errors[name], label=name)
    axis.set_xticks(np.arange(len(ticks)), [tick.replace(", ", ",\n") for tick in ticks], fontsize=8)
    axis.axhline(0, color="black", lw=0.8)
    axis.legend(fontsize=7)


def plot_spreads(axis: Any, rows: list[dict[str, Any]], setting: str) -> None:
    """Excess of the spread about the modes over the target's."""
    names, heights, errors = [target.name for target, _ in CASES[:4]], {}, {}
    for name in PAPER_L2:
        at = {r["target"]: r for r in rows if (r["setting"], r["method"]) == (setting, name) and r["drift"] != "paper"}
        heights[name] = [100 * (at[target]["spread"] - 1) for target in names]
        errors[name] = [200 * at[target]["spread_se"] for target in names]
    bars(axis, heights, errors, names)
    axis.set(title=f"{setting} settings", ylabel="spread about the modes: % too wide")


def plot_l2(axis: Any, rows: list[dict[str, Any]]) -> None:
    """L2 distances on the paper's mixture beside those of its figure."""
    here = [r for r in rows if r["target"] == MIXTURE.name and r["setting"] == "published"]
    found, heights, errors = {(r["method"], r["drift"] == "paper"): r for r in here}, {}, {}
    for label, printed in (("here", False), ("here, drift as printed", True)):
        chosen = [found.get((name, printed)) for name in PAPER_L2]
        heights[label] = [r["l2"] if r else 0.0 for r in chosen]
        errors[label] = [2 * r["l2_se"] if r else 0.0 for r in chosen]
    heights["paper's figure"], errors["paper's figure"] = list(PAPER_L2.values()), [0.0] * len(PAPER_L2)
    bars(axis, heights, errors, [name.replace(" ", ", ", 1) for name in PAPER_L2])
    axis.set(title=f"{MIXTURE.name}, published settings", ylabel="L2 distance of the densities")


def plot_ratio(axis: Any, results: dict[str, Any]) -> None:
    """Ratio of W2 over the noise in units of the grid, a line for every sweep."""
    for label in SWEEPS:
        chosen = sorted(results[label], key=lambda r: r["noise"])
        x, y = [r["noise"] for r in chosen], [r["ratio"] for r in chosen]
        axis.errorbar(x, y, [2 * r["ratio_se"] for r in chosen], marker="o", ms=3, label=f"over {label}")
    axis.set(xscale="log", xlabel="Var ξx / (gap² / 4)", ylabel="W2 of VC / W2 of naive", title="1-D Gaussian, SGHMC")
    axis.axhline(1, color="black", lw=0.8)
    axis.legend(fontsize=7)


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9))
    plot_spreads(axes[0, 0], results["published"], "published")
    plot_spreads(axes[0, 1], results["coarse"], "coarse")
    plot_l2(axes[1, 0], results["published"])
    plot_ratio(axes[1, 1], results)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--chains", type=int, default=32_768, help="a multiple of 16")
    parser.add_argument(
        "--duration", type=float, default=25.0, help="of what is kept after the burn-in, in units of time"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "sghmc_targets.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part, run in PARTS.items():
        if args.part in ("all", part):
            start = time.perf_counter()
            options = {"chains": args.chains, "duration": args.duration, "seed": args.seed}
            results[part] = run(**options)
            machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            seconds = {"threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - start)}
            results[f"{part}, run"] = options | machine | versions | seconds
    path.write_text(json.dumps(results, indent=1))
    rows = results.get("published", []) + results.get("coarse", [])
    if rows:
        with (args.out / "sghmc_targets.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list({key: None for row in rows for key in row}))
            writer.writeheader()
            writer.writerows(rows)
    if all(part in results for part in PARTS):
        plot(results, args.out / "sghmc_targets.png")


if __name__ == "__main__":
    main()
