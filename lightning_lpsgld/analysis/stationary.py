r"""The exact stationary law of a one-dimensional low-precision chain, from the one-step law of the real ops.

A sampler whose weight stays on a fixed-point grid is a Markov chain with :math:`2^W` states. Its transition matrix
has closed forms (:mod:`.onestep`), its stationary law is a linear system: no simulation, no burn-in, no error bars.
One step adds noise of variance :math:`v = 2\eta T`; the target is :math:`\exp(-U/T)` with ``grad`` the gradient of U.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lpsgld.analysis.block_laws import block_grid, naive_block_masses, vc_block_masses
from lightning_lpsgld.analysis.onestep import (
    Masses,
    finite_grid,
    lattice_masses,
    naive_masses,
    rounding_masses,
    vc_masses,
)
from lightning_lpsgld.analysis.sum_law import SummedChain, sum_grid
from lightning_lpsgld.formats import BlockFloatingPoint, FixedPoint, FormatLike, parse_format
from lightning_lpsgld.ops.lattice import Rates

__all__ = ["Update", "stationary_law", "stationary_of", "transition_matrix"]

#: Chains whose exact law is known; the words are those of :data:`.ops.spec.Accumulation`.
Update = Literal["naive", "vc", "lattice"]
Gradient = Callable[[Tensor], Tensor]

#: Gradient noise is averaged over this many points per standard deviation, out to 8.5 of them (midpoint rule).
_NODES_PER_STD = 32
_REACH = 8.5
#: Codes of the rounded gradient that are less likely are left out.
_NEGLIGIBLE = 1e-20


def _check(update: str, lr: float, temperature: float) -> None:
    if update not in get_args(Update):
        raise ValueError(
            f"`update` must be one of {get_args(Update)}, got {update!r}. A full-precision accumulator (SGLDLP-F) is "
            f"no chain on a grid; one of 16 bits is (`accumulator`), and temperature=0 with 'naive' is SGDLP-L."
        )
    for name, value in (("lr", lr), ("temperature", temperature)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"`{name}` must be finite and >= 0, got {value}.")


def _noise_on(grid: Tensor, gradient_std: float | Gradient) -> Tensor:
    """Standard deviation of the gradient's noise at every state."""
    given = gradient_std(grid) if callable(gradient_std) else gradient_std
    std = torch.as_tensor(given, dtype=torch.float64).expand(grid.shape)
    if not bool(((std >= 0) & std.isfinite()).all()):
        raise ValueError(f"`gradient_std` must be finite and >= 0, got {given}.")
    return std


def _gradient_nodes(exact: Tensor, std: float | Tensor, fmt: FixedPoint | None) -> tuple[Tensor, Tensor, Tensor]:
    """State index, gradient and weight of every value that the (noisy, rounded) gradient can take at each state."""
    states = len(exact)
    if fmt is not None:
        _, grid = finite_grid(fmt)
        spread = torch.as_tensor(std, dtype=torch.float64) ** 2 / fmt.gap**2
        index, code, weight = rounding_masses(exact / fmt.gap, spread, grid / fmt.gap, splines=2)
        likely = weight > _NEGLIGIBLE
        return index[likely], grid[code[likely]], weight[likely]
    spread = torch.as_tensor(std, dtype=torch.float64).expand(exact.shape)
    if not bool((spread > 0).any()):
        return torch.arange(states), exact, torch.ones(states, dtype=torch.float64)
    count = 2 * int(_REACH * _NODES_PER_STD)
    z = (torch.arange(count, dtype=torch.float64) + 0.5) / _NODES_PER_STD - _REACH
    weight = torch.exp(-0.5 * z * z)
    weight = weight / weight.sum()
    index = torch.arange(states).repeat_interleave(count)
    return index, (exact[:, None] + spread[:, None] * z).flatten(), weight.repeat(states)


def _chain_grid(fmt: FormatLike, update: Update) -> tuple[FixedPoint | BlockFloatingPoint, Tensor]:
    """The format and the states of a chain of one weight, in increasing order."""
    number = parse_format(fmt)
    if not isinstance(number, BlockFloatingPoint):
        return finite_grid(number)
    if update == "lattice":
        raise TypeError(f"The exact law of the lattice walk needs a fixed-point format, got {number}.")
    return block_grid(number)


def transition_matrix(
    update: Update,
    fmt: FormatLike,
    *,
    lr: float,
    temperature: float,
    grad: Gradient,
    gradient_std: float | Gradient = 0.0,
    gradient_format: FormatLike | None = None,
    rates: Rates = "exponential",
    curvature: float = 0.0,
    penalty: bool = False,
) -> Tensor:
    r"""One-step transition probabilities between all values of ``fmt``.

    Args:
        update: ``"naive"``: noise, then stochastic rounding. ``"vc"``: Q^vc. ``"lattice"``: the walk of
            :mod:`lightning_lpsgld.ops.lattice`.
        fmt: Fixed-point format of at most 12 bits; for ``"naive"`` and ``"vc"`` also a block format with at most 4 bits
            of exponent (``"bfp8e3"``: 2^-4 to 2^3), whose blocks have one element and pass powers of two.
        lr: Step size η >= 0.
        temperature: T >= 0; a step has noise of variance v = 2ηT.
        grad: Gradient of U, called once on the grid (float64, shape ``(2**W,)``).
        gradient_std: Standard deviation of Gaussian noise on the gradient; callable on the grid where it depends on θ.
        gradient_format: Fixed-point format to which the noisy gradient is rounded stochastically; ``None``: it is not.
        rates: For ``"lattice"``.
        curvature: For ``"lattice"``: second derivative of U that the walk is told; 0: it is told none.
        penalty: For ``"lattice"`` with exponential rates: whether the walk is told ``gradient_std``, too.

    Returns:
        Matrix P, float64, shape ``(K, K)`` with K values (2**W of a fixed point); row k is the law after one step from
        the k-th smallest.

    Raises:
        ValueError: If ``update`` is unknown or a number is negative or not finite.
        TypeError: If a format is not as above; that of the gradient is a fixed point.

    Note:
        Gradient noise that is not rounded has a closed form for ``"naive"`` and for Q^vc above :math:`\Delta^2/4`;
        otherwise it is averaged over 544 points, with an error below 1e-4 of each probability.

    Example:
        >>> matrix = transition_matrix("vc", "fixed4.2", lr=0.1, temperature=1.0, grad=lambda x: x)
        >>> matrix.shape, bool((matrix.sum(1) - 1).abs().max() < 1e-12)
        (torch.Size([16, 16]), True)
    """
    _check(update, lr, temperature)
    number, grid = _chain_grid(fmt, update)
    std = _noise_on(grid, gradient_std)
    rounded = None if gradient_format is None else finite_grid(gradient_format)[0]
    exact, variance = grad(grid).double().expand(grid.shape), 2.0 * lr * temperature
    extra = (lr * std) ** 2 if rounded is None else torch.zeros_like(std)
    closed = update == "naive" or (update == "vc" and number.gap is not None and variance > number.gap**2 / 4)
    nodes = _gradient_nodes(exact, 0.0 if closed and rounded is None else std, rounded)

    def law(at: Tensor, g: Tensor) -> Masses:
        if isinstance(number, BlockFloatingPoint):
            if update == "naive":
                return naive_block_masses(grid[at] - lr * g, variance + extra[at], number, grid)
            return vc_block_masses(grid[at] - lr * g, variance, number, grid)
        if update == "naive":
            return naive_masses(grid[at] - lr * g, variance + extra[at], number, grid)
        if update == "vc":
            return vc_masses(grid[at] - lr * g, variance, number, grid, extra[at] if closed else 0.0)
        told = lr * std[at] if penalty else 0.0
        return lattice_masses(grid[at], -lr * g, variance, number, grid, rates, lr * curvature, told)

    return _mixture(nodes, len(grid), law)


def _mixture(
    nodes: tuple[Tensor, Tensor, Tensor], states: int, law: Callable[[Tensor, Tensor], Masses], chunk: int = 4096
) -> Tensor:
    """Average the one-step laws over the values of the gradient, in chunks that bound the memory."""
    index, gradient, weight = nodes
    matrix = torch.zeros(states, states, dtype=torch.float64)
    for at, g, w in zip(index.split(chunk), gradient.split(chunk), weight.split(chunk)):
        row, code, mass = law(at, g)
        matrix.index_put_((at[row], code), w[row] * mass, accumulate=True)
    return matrix / matrix.sum(1, keepdim=True)


def stationary_of(matrix: Tensor, order: Tensor | None = None) -> Tensor:
    """Stationary law of a transition matrix by Grassmann-Taksar-Heyman elimination: no subtraction, no loss of digits.

    Args:
        matrix: Rows sum to 1, shape ``(K, K)``; the diagonal is not used.
        order: States from the one to be kept longest to the first to go; by default as they stand. Unlikely states
            should go first: those that cannot be left in floating point stop the elimination.

    Returns:
        Probabilities, float64, shape ``(K,)``.

    Raises:
        ValueError: If the chain falls apart: a state has no way to those after it.

    Example:
        >>> import torch
        >>> stationary_of(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
        tensor([0.3333, 0.6667], dtype=torch.float64)

    Reference:
        Grassmann, Taksar & Heyman, 1985, "Regenerative analysis and steady state distributions for Markov chains".
    """
    order = torch.arange(len(matrix)) if order is None else order
    work = matrix.double()[order][:, order].clone()
    for k in range(len(work) - 1, 0, -1):
        leave = work[k, :k].sum()
        if not leave > 0:
            raise ValueError(
                f"State {int(order[k])} cannot be left towards likelier states: the chain has no single stationary "
                f"law in floating point. Raise the temperature or the step size, or widen the range."
            )
        work[:k, k] /= leave
        work[:k, :k] += work[:k, k, None] * work[k, None, :k]
    law = torch.ones(len(work), dtype=torch.float64)
    for k in range(1, len(work)):
        law[k] = law[:k] @ work[:k, k]
        law[: k + 1] /= law[: k + 1].sum()
    out = torch.empty_like(law)
    out[order] = law
    return out


def potential_on(grid: Tensor, grad: Gradient) -> Tensor:
    """U on the grid up to a constant: the trapezoid sum of its gradient, smallest value 0."""
    slope = grad(grid).double().expand(grid.shape)
    steps = (slope[1:] + slope[:-1]) / 2 * (grid[1:] - grid[:-1])
    height = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    return height - height.min()


def stationary_law(
    update: Update,
    fmt: FormatLike,
    *,
    lr: float,
    temperature: float,
    grad: Gradient,
    accumulator: FormatLike = "low",
    gradient_std: float | Gradient = 0.0,
    gradient_format: FormatLike | None = None,
    rates: Rates = "exponential",
    curvature: float | None = None,
    penalty: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Exact long-run law of a one-dimensional low-precision sampler on the grid of its weight.

    Args:
        update: ``"naive"`` (naive SGLDLP-L), ``"vc"`` (VC SGLDLP-L) or ``"lattice"``.
        fmt: Format of the weight, as :func:`transition_matrix`.
        lr: Step size η > 0.
        temperature: T >= 0; the target is :math:`\exp(-U/T)` and a step adds noise of variance 2ηT. With 0 and
            ``"naive"`` this is SGDLP-L.
        grad: Gradient of U, called on the grid of the weight.
        accumulator: ``"low"``: the weight is the sum of the steps. A fixed-point or block format of at most 16 bits:
            the steps are summed on that grid, and gradients are those at the sum's stochastic rounding to ``fmt``; a
            block is taken at the exponent at which its range is that of ``fmt``. Not with ``"lattice"``.
        gradient_std: Standard deviation of Gaussian noise on the gradient; callable on the grid where it depends on θ.
        gradient_format: Fixed-point format of the gradient (stochastic rounding); ``None``: full precision.
        rates: For ``"lattice"``; see :mod:`lightning_lpsgld.ops.lattice`.
        curvature: For ``"lattice"``: the second derivative of U that the walk is told. ``None`` takes the one at the
            lowest point of U (by differences of ``grad``); 0 tells it none, as in training.
        penalty: As :func:`transition_matrix`.

    Returns:
        The grid in increasing order and the probability of each value, both float64, shape ``(K,)``: of the weight, or,
        where they are summed elsewhere, of the sum. :func:`.view_law` makes the weight's law of the sum's.

    Raises:
        ValueError: As :func:`transition_matrix` and :func:`stationary_of`.
        TypeError: As :func:`transition_matrix`; with an accumulator, if a format is not as above.

    Note:
        With an accumulator the cost grows with the cube of the longest step in its gaps: for weights ``"fixed8.3"``
        and ``"fixed16.11"``, seconds at T = 1e-3 and minutes at T = 1.

    Example:
        >>> grid, p = stationary_law("vc", "fixed8.3", lr=1e-3, temperature=1.0, grad=lambda x: x)
        >>> round(float((p * grid**2).sum().sqrt()), 3)
        1.0

    Reference:
        The samplers: Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, equations 2 to 4.
    """
    if accumulator != "low":
        chain = _summed(update, fmt, accumulator, lr, temperature, grad, gradient_std, gradient_format)
        return chain.grid, chain.stationary()
    _, grid = _chain_grid(fmt, update)
    height = potential_on(grid, grad)
    told = _curvature_at_mode(grid, height, grad) if curvature is None else curvature
    matrix = transition_matrix(
        update,
        fmt,
        lr=lr,
        temperature=temperature,
        grad=grad,
        gradient_std=gradient_std,
        gradient_format=gradient_format,
        rates=rates,
        curvature=told,
        penalty=penalty,
    )
    return grid, stationary_of(matrix, height.argsort())


def _curvature_at_mode(grid: Tensor, height: Tensor, grad: Gradient) -> float:
    slope, at = grad(grid).double().expand(grid.shape), int(height.argmin())
    low, high = max(at - 1, 0), min(at + 1, len(grid) - 1)
    return max(float((slope[high] - slope[low]) / (grid[high] - grid[low])), 0.0)


def _summed(
    update: Update,
    fmt: FormatLike,
    accumulator: FormatLike,
    lr: float,
    temperature: float,
    grad: Gradient,
    gradient_std: float | Gradient,
    gradient_format: FormatLike | None,
) -> SummedChain:
    """The chain of sums on one grid that looks at gradients on another."""
    _check(update, lr, temperature)
    number, grid = finite_grid(fmt)
    sums = sum_grid(accumulator, number)
    if update == "lattice":
        raise ValueError("`update` 'lattice' walks on the grid of the weight: it takes accumulator='low' only.")
    std = _noise_on(grid, gradient_std)
    rounded = None if gradient_format is None else finite_grid(gradient_format)[0]
    exact, variance = grad(grid).double().expand(grid.shape), 2.0 * lr * temperature
    extra = (lr * std) ** 2 if rounded is None else torch.zeros_like(std)
    closed = update == "naive" or variance > sums.gap**2 / 4
    nodes = _gradient_nodes(exact, 0.0 if closed and rounded is None else std, rounded)
    values = torch.arange(sums.code_min, sums.code_max + 1, dtype=torch.float64) * sums.gap

    def law(mean: Tensor, at: Tensor) -> Masses:
        if update == "naive":
            return naive_masses(mean, variance + extra[at], sums, values)
        return vc_masses(mean, variance, sums, values, extra[at] if closed else 0.0)

    spread = math.sqrt(variance + (float(extra.max()) if closed else 0.0))
    mode = float(grid[potential_on(grid, grad).argmin()])
    return SummedChain(sums, number, lr, nodes, law, spread, mode)
