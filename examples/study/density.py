"""The paper's Gaussian: density of 8-bit samplers, and their distance to the target against the step size.

::

    python examples/study/density.py     # density.json and density.png in examples/results/study (3 minutes)

Target N(0, 1), weights and gradients in 8-bit fixed point with 3 fraction bits, gradients with noise of standard
deviation 0.1 (figure 1 of Zhang, Wilson & De Sa, 2022). Laws of the 8-bit accumulators are exact (stationary laws of
the chain of 256 states); those of the 16-bit and of the full accumulator are 20,000 chains that start at the target and
run for four of its relaxation times.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.analysis import moments, stationary_law, wasserstein2
from lightning_lpsgld.samplers import SGLD

__all__ = ["STEP_SIZES", "exact", "figure", "sampled"]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "study"
FORMAT, GRADIENT_STD = "fixed8.3", 0.1
STEP_SIZES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
#: What the figure shows: name -> accumulator, of the sampled ones.
ACCUMULATORS = {"16-bit accumulator": "fixed16.11", "SGLDLP-F": "full"}
EXACT = {"naive SGLDLP-L": "naive", "VC SGLDLP-L": "vc"}


def exact(update: Any, lr: float) -> tuple[Tensor, Tensor]:
    """Grid and stationary probabilities of an 8-bit accumulator, each of shape (256,)."""
    return stationary_law(
        update, FORMAT, lr=lr, temperature=1.0, grad=lambda x: x, gradient_std=GRADIENT_STD, gradient_format=FORMAT
    )


def sampled(accumulator: str, lr: float, chains: int = 20_000, times: float = 4.0) -> tuple[Tensor, Tensor]:
    """Values and frequencies of the stored 8-bit weights of many chains, after so many relaxation times 1/lr."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(chains, generator=generator))
    formats = {"weight_format": FORMAT, "gradient_format": FORMAT}
    sampler = SGLD([weight], lr, num_data=1, temperature=1.0, accumulator=accumulator, seed=0, **formats)
    for _ in range(round(times / lr)):
        noise = torch.randn(chains, generator=generator)
        weight.grad = weight.detach() + GRADIENT_STD * noise
        sampler.step()
    values, counts = weight.detach().double().unique(return_counts=True)
    return values, counts.double() / chains


def summary(values: Tensor, probability: Tensor) -> dict[str, Any]:
    """Standard deviation, W2 to N(0, 1), and the law itself."""
    keep = probability > 1e-6
    law = [[round(float(v), 6), round(float(p), 7)] for v, p in zip(values[keep], probability[keep])]
    return {"std": math.sqrt(moments(values, probability)[1]), "w2": wasserstein2(values, probability), "law": law}


def figure(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Left: densities at the smallest step size; right: W2 against the step size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    gap, x = 0.125, torch.linspace(-5, 5, 400)
    left.fill_between(x, torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), color="0.85", label="N(0, 1)")
    for index, (name, by_step) in enumerate(results.items()):
        law = torch.tensor(by_step[f"{STEP_SIZES[-1]:g}"]["law"])
        left.plot(law[:, 0], law[:, 1] / gap, color=f"C{index}", label=name)
        steps = sorted(by_step, key=float)
        right.plot([float(s) for s in steps], [by_step[s]["w2"] for s in steps], "o-", color=f"C{index}", label=name)
    right.axhline(gap / math.sqrt(12), color="0.5", linestyle=":", label="N(0, 1) rounded to the grid")
    left.set(xlim=(-5, 5), xlabel="weight", title=f"density at step size {STEP_SIZES[-1]:g}")
    right.set(xscale="log", yscale="log", xlabel="step size", title="W2 to N(0, 1)")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, update in EXACT.items():
        results[name] = {f"{lr:g}": summary(*exact(update, lr)) for lr in STEP_SIZES}
    for name, accumulator in ACCUMULATORS.items():
        results[name] = {f"{lr:g}": summary(*sampled(accumulator, lr)) for lr in STEP_SIZES}
    for name, by_step in results.items():
        print(f"{name:20}", *(f"{s}: std {e['std']:.3f} W2 {e['w2']:.3f}  " for s, e in by_step.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "results": results}
    (args.out / "density.json").write_text(json.dumps(record) + "\n")
    figure(results, args.out / "density.png")


if __name__ == "__main__":
    main()
