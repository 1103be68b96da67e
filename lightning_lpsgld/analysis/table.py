"""The table of ``docs/theory.md``: exact Var/T and W2 by update. ``python -m lightning_lpsgld.analysis.table``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from lightning_lpsgld.analysis.distance import best_on_grid, gibbs_on_grid, variance_ratio, wasserstein2
from lightning_lpsgld.analysis.stationary import Update, stationary_law
from lightning_lpsgld.analysis.underdamped_table import print_rows, print_toys
from lightning_lpsgld.formats import FormatLike

__all__ = ["COLUMNS", "main", "rows"]

#: Heading -> arguments of :func:`.stationary_law`. "told": the walk knows the curvature 1.
COLUMNS: dict[str, tuple[Update, dict[str, Any]]] = {
    "naive": ("naive", {}),
    "vc": ("vc", {}),
    "exponential": ("lattice", {"curvature": 0.0}),
    "exponential, told": ("lattice", {}),
    "bernoulli": ("lattice", {"rates": "bernoulli", "curvature": 0.0}),
    "bernoulli, told": ("lattice", {"rates": "bernoulli"}),
    "heat-bath": ("lattice", {"rates": "heat-bath", "curvature": 0.0}),
}


def _identity(x: Tensor) -> Tensor:
    return x


def rows(
    fmt: FormatLike = "fixed8.3",
    step_sizes: Sequence[float] = (2e-2, 2e-3, 2e-4),
    temperatures: Sequence[float] = (1.0, 0.1, 0.01, 0.001),
    gradient_std: float = 0.0,
) -> Iterator[tuple[float, float, dict[str, tuple[float, float]]]]:
    r"""Exact laws on the target N(0, T), that is U = θ²/2.

    Args:
        fmt: Fixed-point format of the weight.
        step_sizes: η.
        temperatures: T.
        gradient_std: Standard deviation of Gaussian gradient noise.

    Yields:
        T, η and, per column, Var/T and W2 to N(0, T). ``"target on points"`` is the target restricted to the grid,
        ``"target rounded"`` the closest law on the grid in W2.
    """
    for temperature in temperatures:
        target = Normal(torch.tensor(0.0).double(), torch.tensor(temperature).double().sqrt())
        for lr in step_sizes:
            laws = {
                name: stationary_law(
                    update, fmt, lr=lr, temperature=temperature, grad=_identity, gradient_std=gradient_std, **options
                )
                for name, (update, options) in COLUMNS.items()
            }
            grid = laws["naive"][0]
            laws["target on points"] = gibbs_on_grid(grid, grid**2 / 2, temperature)
            laws["target rounded"] = best_on_grid(grid, target)
            cells = {n: (variance_ratio(*law, temperature), wasserstein2(*law, target)) for n, law in laws.items()}
            yield temperature, lr, cells


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables as Markdown.

    Args:
        argv: Command line; ``--format`` and ``--gradient-std``; ``--sghmc`` or ``--toys`` for those of SGHMC.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", default="fixed8.3", help="fixed-point format of the weight")
    parser.add_argument("--gradient-std", type=float, default=0.0, help="standard deviation of the gradient noise")
    parser.add_argument("--sghmc", action="store_true", help="the tables of SGHMC instead (two minutes)")
    parser.add_argument("--velocity-format", default="fixed8.4", help="fixed-point format of SGHMC's velocity")
    parser.add_argument("--toys", action="store_true", help="SGHMC on the published targets instead (ten minutes)")
    args = parser.parse_args(argv)
    if args.toys:
        return print_toys()
    if args.sghmc:
        return print_rows(args.format, args.velocity_format)
    return _print_sgld(args)


def _print_sgld(args: argparse.Namespace) -> None:
    names = [*COLUMNS, "target on points", "target rounded"]
    for title, pick in (("Var/T", 0), ("W2 to N(0, T)", 1)):
        print(f"\n{title}, {args.format}, gradient noise {args.gradient_std}\n")
        print("| T | step | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
        for temperature, lr, cells in rows(args.format, gradient_std=args.gradient_std):
            values = " | ".join(f"{cells[name][pick]:.4f}" for name in names)
            print(f"| {temperature:g} | {lr:g} | {values} |")


if __name__ == "__main__":
    main()
