"""Tables of SGHMC in ``docs/theory.md``: ``python -m lightning_lpsgld.analysis.table --sghmc`` and ``--toys``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.distributions import Normal

from lightning_lpsgld.analysis.distance import best_on_grid, moments, wasserstein2
from lightning_lpsgld.analysis.onestep import finite_grid
from lightning_lpsgld.analysis.phase_space import underdamped_stationary_law
from lightning_lpsgld.analysis.underdamped import Drift, UnderdampedUpdate, step_flow
from lightning_lpsgld.formats import FormatLike

__all__ = ["TOYS", "Cell", "Toy", "full_precision_variance", "print_rows", "print_toys", "toy_row", "underdamped_rows"]

#: Friction and inverse mass of the published Gaussian toy.
FRICTION, INVERSE_MASS = 3.0, 2.0


@dataclass(frozen=True)
class Cell:
    """One law against its target.

    Attributes:
        position: Variance of the position over the target's.
        velocity: Variance of the velocity over u·T; NaN where there is none.
        distance: W2 of the position to its target.
    """

    position: float
    velocity: float
    distance: float


def full_precision_variance(lr: float, temperature: float, friction: float, inverse_mass: float) -> tuple[float, float]:
    """Stationary variances of x and v without rounding for U = x²/2: Lyapunov's equation of the exact integrator.

    Args:
        lr: η > 0.
        temperature: T >= 0.
        friction: γ > 0.
        inverse_mass: u > 0.

    Returns:
        The two variances.

    Example:
        >>> round(full_precision_variance(0.09, 1.0, 3.0, 2.0)[0], 3)
        1.031
    """
    flow = step_flow("naive", "corrected", lr=lr, temperature=temperature, friction=friction, inverse_mass=inverse_mass)
    a = torch.tensor([[1 - flow.shift, flow.carry], [-flow.kick, flow.keep]], dtype=torch.float64)
    noise = torch.tensor([flow.var_x, flow.cov, flow.cov, flow.var_v], dtype=torch.float64)
    covariance = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - torch.kron(a, a), noise)
    return float(covariance[0]), float(covariance[3])


def _identity(x: Tensor) -> Tensor:
    return x


def underdamped_rows(
    weight_format: FormatLike = "fixed8.3",
    velocity_format: FormatLike = "fixed8.4",
    step_sizes: Sequence[float] = (2e-2, 2e-3, 2e-4),
    temperatures: Sequence[float] = (1.0, 0.1, 0.01, 0.001),
) -> Iterator[tuple[float, float, dict[str, Cell]]]:
    r"""Exact laws of SGHMC on the target N(0, T), that is U = x²/2, at u = 2 and γ = 3.

    Args:
        weight_format: Fixed-point format of the position.
        velocity_format: Fixed-point format of the velocity.
        step_sizes: η, times.
        temperatures: T.

    Yields:
        T, η and the cells of ``"naive"``, ``"vc"``, ``"full precision"`` (no rounding) and ``"target rounded"`` (the
        closest law on the grid in W2).
    """
    for temperature in temperatures:
        target = Normal(torch.tensor(0.0).double(), torch.tensor(temperature).double().sqrt())
        best = best_on_grid(finite_grid(weight_format)[1], target)
        for lr in step_sizes:
            cells = {
                update: _cell(update, weight_format, velocity_format, lr, temperature, target)
                for update in get_args(UnderdampedUpdate)
            }
            exact_x, exact_v = full_precision_variance(lr, temperature, FRICTION, INVERSE_MASS)
            distance = abs(math.sqrt(exact_x) - math.sqrt(temperature))
            cells["full precision"] = Cell(exact_x / temperature, exact_v / (INVERSE_MASS * temperature), distance)
            cells["target rounded"] = Cell(moments(*best)[1] / temperature, math.nan, wasserstein2(*best, target))
            yield temperature, lr, cells


def _cell(
    update: UnderdampedUpdate,
    weight_format: FormatLike,
    velocity_format: FormatLike,
    lr: float,
    temperature: float,
    target: Normal,
) -> Cell:
    x, v, law = underdamped_stationary_law(
        update, weight_format, velocity_format, lr=lr, temperature=temperature, friction=FRICTION,
        inverse_mass=INVERSE_MASS, grad=_identity,
    )  # fmt: skip
    position, velocity = law.sum(1), law.sum(0)
    return Cell(
        moments(x, position)[1] / temperature,
        moments(v, velocity)[1] / (INVERSE_MASS * temperature),
        wasserstein2(x, position, target),
    )


@dataclass(frozen=True)
class Toy:
    """A published target in one dimension with its setting; formats are fixed8.4 for position and velocity.

    Attributes:
        name: For display.
        grad: Gradient of U.
        cdf: Distribution function of the target.
        variance: Its variance.
        lr: η.
        inverse_mass: u; γ is 3.
    """

    name: str
    grad: Callable[[Tensor], Tensor]
    cdf: Callable[[Tensor], Tensor]
    variance: float
    lr: float
    inverse_mass: float


def _mixture_grad(x: Tensor) -> Tensor:
    """Of U = -log(exp(-2(x-1)²) + exp(-2(x+1)²))."""
    return 4.0 * (x - torch.tanh(4.0 * x))


def _mixture_cdf(x: Tensor) -> Tensor:
    return 0.5 * (torch.special.ndtr(2.0 * (x - 1.0)) + torch.special.ndtr(2.0 * (x + 1.0)))


#: The one-dimensional targets of the table.
TOYS = (
    Toy("Gaussian", _identity, torch.special.ndtr, 1.0, 0.09, 2.0),
    Toy("mixture", _mixture_grad, _mixture_cdf, 1.25, 0.1, 1.0),
)

#: Heading -> update and drift.
METHODS: dict[str, tuple[UnderdampedUpdate, Drift]] = {
    "naive": ("naive", "corrected"),
    "vc": ("vc", "corrected"),
    "naive, as printed": ("naive", "paper"),
    "vc, as printed": ("vc", "paper"),
}


def toy_row(toy: Toy, fmt: FormatLike = "fixed8.4") -> dict[str, Cell]:
    """Exact laws on a published target: naive and VC, with the right sign and joint noise and as printed.

    Args:
        toy: One of :data:`TOYS`.
        fmt: Fixed-point format of position and velocity; published is fixed8.4.

    Returns:
        Heading to cell, ``"target rounded"`` included.
    """
    line = torch.linspace(-8.0, 8.0, 200_001, dtype=torch.float64)
    fine = (line[1:] + line[:-1]) / 2, toy.cdf(line).diff()
    cells = {}
    for name, (update, drift) in METHODS.items():
        x, v, law = underdamped_stationary_law(
            update, fmt, fmt, lr=toy.lr, temperature=1.0, friction=FRICTION, inverse_mass=toy.inverse_mass,
            grad=toy.grad, drift=drift,
        )  # fmt: skip
        position = law.sum(1)
        cells[name] = Cell(
            moments(x, position)[1] / toy.variance,
            moments(v, law.sum(0))[1] / toy.inverse_mass,
            wasserstein2(x, position, fine),
        )
    best = best_on_grid(finite_grid(fmt)[1], toy.cdf)
    cells["target rounded"] = Cell(moments(*best)[1] / toy.variance, math.nan, wasserstein2(*best, fine))
    return cells


def print_rows(weight_format: FormatLike = "fixed8.3", velocity_format: FormatLike = "fixed8.4") -> None:
    """Print the three tables of :func:`underdamped_rows` as Markdown."""
    found = list(underdamped_rows(weight_format, velocity_format))
    every = ("naive", "vc", "full precision", "target rounded")
    setting = f"position {weight_format}, velocity {velocity_format}"
    for title, pick, names in (
        ("Var x/T", "position", every),
        ("W2 of x to N(0, T)", "distance", every),
        ("Var v/uT", "velocity", every[:3]),
    ):
        print(f"\nSGHMC, {title}, {setting}\n")
        print("| T | step | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
        for temperature, lr, cells in found:
            values = " | ".join(f"{getattr(cells[name], pick):.4f}" for name in names)
            print(f"| {temperature:g} | {lr:g} | {values} |")


def print_toys(fmt: FormatLike = "fixed8.4") -> None:
    """Print :func:`toy_row` of both targets as Markdown."""
    print(f"\nSGHMC, published targets, {fmt}\n")
    print("| target | law | Var x/target | W2 | Var v/u |\n|---|---|---|---|---|")
    for toy in TOYS:
        for name, cell in toy_row(toy, fmt).items():
            velocity = "" if math.isnan(cell.velocity) else f"{cell.velocity:.4f}"
            print(f"| {toy.name} | {name} | {cell.position:.4f} | {cell.distance:.4f} | {velocity} |")
