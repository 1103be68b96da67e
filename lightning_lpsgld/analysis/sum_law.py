r"""The exact stationary law of a chain whose steps are summed on a grid of their own, finer than that of the weight.

The state is the sum a on a fixed-point grid A. A step looks at the weight's stochastic rounding θ of a, which is one of
two values, and goes to :math:`Q_A(a - \eta g(\theta),\; v)`: a mixture over θ of the one-step laws of :mod:`.onestep`.
A has up to :math:`2^{16}` states, but no step is longer than drift and noise together reach, so that in runs of that
many states the chain is block tridiagonal and is solved exactly (:mod:`.elimination`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_lpsgld.analysis.elimination import Level, stationary_by_levels
from lightning_lpsgld.analysis.onestep import Masses, finite_grid, rounding_masses
from lightning_lpsgld.formats import BlockFloatingPoint, FixedPoint, FormatLike, parse_format
from lightning_lpsgld.ops.splines import NOISE_REACH

__all__ = ["SummedChain", "sum_grid", "view_law"]

#: Shorter runs of states would cost more in calls than they save in arithmetic.
_SHORTEST_RUN = 128
#: Longer ones would not be solved in minutes.
_LONGEST_RUN = 8192
_LONGEST_WORD = 16
_CHUNK = 4096


def sum_grid(accumulator: FormatLike, weights: FixedPoint) -> FixedPoint:
    """Fixed point on which a sum moves; blocks at the exponent at which their range is that of the weights.

    Raises:
        TypeError: If there is no such grid, or it has more than 16 bits.
    """
    number = parse_format(accumulator)
    if isinstance(number, BlockFloatingPoint):
        fraction = number.word_length - weights.word_length + weights.fraction_length
        number = FixedPoint(number.word_length, fraction, symmetric=True)
    if not isinstance(number, FixedPoint) or number.word_length > _LONGEST_WORD:
        raise TypeError(
            f"Exact laws need an accumulator on a finite, even grid: fixed point or block floating point of at most "
            f"{_LONGEST_WORD} bits, such as 'fixed16.11' or 'bfp16'; got {number}."
        )
    return number


def view_law(grid: Tensor, probability: Tensor, fmt: FormatLike) -> tuple[Tensor, Tensor]:
    """Law of the weight that is the stochastic rounding of a sum: what the network sees, and what is stored.

    Args:
        grid: Values of the sum, float64, shape ``(K,)``.
        probability: Theirs.
        fmt: Fixed-point format of the weight, at most 12 bits.

    Returns:
        Values of ``fmt`` in increasing order and the probability of each, float64.

    Example:
        >>> import torch
        >>> values, p = view_law(torch.tensor([0.125]).double(), torch.ones(1).double(), "fixed4.2")
        >>> [(float(v), float(q)) for v, q in zip(values, p) if q > 0]
        [(0.0, 0.5), (0.25, 0.5)]
    """
    number, values = finite_grid(fmt)
    still = torch.zeros(1, dtype=torch.float64)
    row, code, mass = rounding_masses(grid / number.gap, still, values / number.gap, splines=2)
    law = torch.zeros(len(values), dtype=torch.float64)
    return values, law.index_add_(0, code, mass * probability[row])


@dataclass(frozen=True)
class SummedChain:
    """A chain of sums.

    Attributes:
        sums: Format of the sum.
        weights: Format of the weight.
        lr: η.
        nodes: Index of the weight's value in increasing order (sorted), gradient and weight of every value that the
            gradient takes there.
        law: (means, indices of the weights' values) -> masses of one rounding onto the grid of the sums.
        spread: Largest standard deviation of the noise of a step, in weight units.
        mode: A likely value of the sum.
    """

    sums: FixedPoint
    weights: FixedPoint
    lr: float
    nodes: tuple[Tensor, Tensor, Tensor]
    law: Callable[[Tensor, Tensor], Masses]
    spread: float
    mode: float

    @cached_property
    def grid(self) -> Tensor:
        """Values of the sum in increasing order, float64."""
        codes = torch.arange(self.sums.code_min, self.sums.code_max + 1, dtype=torch.float64)
        return codes * self.sums.gap

    @cached_property
    def _codes(self) -> Tensor:
        return torch.arange(self.weights.code_min, self.weights.code_max + 1, dtype=torch.float64)

    @cached_property
    def _counts(self) -> Tensor:
        return torch.bincount(self.nodes[0], minlength=len(self._codes))

    @cached_property
    def run(self) -> int:
        """States to a level: no step is longer.

        Raises:
            ValueError: If steps are so long that the levels could not be solved.
        """
        noise = NOISE_REACH * self.spread / self.sums.gap
        drift = self.lr * float(self.nodes[1].abs().max()) / self.sums.gap
        longest = math.ceil(noise + drift) + 4
        if longest > _LONGEST_RUN:
            raise ValueError(
                f"A step moves the sum by up to {longest} gaps of {self.sums}, and the exact law is solved for at most "
                f"{_LONGEST_RUN}. Take a coarser `accumulator`, or a smaller `lr` or `temperature`."
            )
        return min(max(longest, _SHORTEST_RUN), len(self.grid))

    def stationary(self) -> Tensor:
        """Probability of every value of the sum, float64, shape of :attr:`grid`."""
        anchor = int((self.grid - self.mode).abs().argmin())
        count = -(-len(self.grid) // self.run)
        return torch.cat(stationary_by_levels(self._level, count, anchor // self.run, anchor % self.run))

    def _level(self, number: int) -> Level:
        first = number * self.run
        states = torch.arange(first, min(first + self.run, len(self.grid)))
        left, right = max(first - self.run, 0), min(int(states[-1]) + 1 + self.run, len(self.grid))
        moves = torch.zeros(len(states), right - left, dtype=torch.float64)
        at, weight_code, gradient, share = self._looks(states)
        for i in range(0, len(at), _CHUNK):
            some = slice(i, i + _CHUNK)
            means = self.grid[states[at[some]]] - self.lr * gradient[some]
            row, code, mass = self.law(means, weight_code[some])
            moves.index_put_((at[some][row], code - left), share[some][row] * mass, accumulate=True)
        moves /= moves.sum(1, keepdim=True)
        cut = [first - left, len(states), right - left - (first - left) - len(states)]
        down, stay, up = moves.split(cut, dim=1)
        return down.contiguous(), stay.contiguous(), up.contiguous()

    def _looks(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row of ``states``, index of the weight's value, gradient and share of every gradient a state may meet."""
        _, gradient, weight = self.nodes
        still = torch.zeros(1, dtype=torch.float64)
        row, code, mass = rounding_masses(self.grid[states] / self.weights.gap, still, self._codes, splines=2)
        seen = mass > 0
        row, code, mass = row[seen], code[seen], mass[seen]
        counts = self._counts[code]
        pair = torch.arange(len(row)).repeat_interleave(counts)
        within = torch.arange(len(pair)) - (counts.cumsum(0) - counts)[pair]
        node = (self._counts.cumsum(0) - self._counts)[code[pair]] + within
        return row[pair], code[pair], gradient[node], mass[pair] * weight[node]
