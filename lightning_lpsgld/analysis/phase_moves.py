r"""Moves of the chain of (x, v) of low-precision SGHMC on the part of its states that is kept.

In two forms: dense, level by level of some positions, for elimination; and as a list of entries, for stepping a law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lpsgld.analysis.elimination import Level
from lightning_lpsgld.analysis.onestep import finite_grid, rounding_masses
from lightning_lpsgld.analysis.stationary import potential_on
from lightning_lpsgld.analysis.underdamped import PairMasses, PhaseGrid, UnderdampedUpdate, pair_masses
from lightning_lpsgld.formats import FixedPoint
from lightning_lpsgld.ops.flow import Flow

__all__ = ["Chain", "Entries", "Levels", "Part", "States"]

#: States whose laws are computed together.
_CHUNK = 256
#: Entries of the list that are less likely are left out; laws are made to sum to 1 again.
_NEGLIGIBLE = 1e-13


@dataclass(frozen=True)
class Chain:
    """One step of the sampler on a target."""

    update: UnderdampedUpdate
    flow: Flow
    space: PhaseGrid
    grad: Callable[[Tensor], Tensor]
    gradient_format: FixedPoint | None


@dataclass(frozen=True)
class Part:
    """Codes that are kept, and how many positions make a level: ``low <= index < high``."""

    x_low: int
    x_high: int
    v_low: int
    v_high: int
    band: int

    @property
    def positions(self) -> slice:
        """Positions that are kept."""
        return slice(self.x_low, self.x_high)

    @property
    def velocities(self) -> slice:
        """Velocities that are kept."""
        return slice(self.v_low, self.v_high)


def _force_nodes(exact: Tensor, fmt: FixedPoint | None) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the position, gradient and weight of every value that the rounded gradient can take there."""
    if fmt is None:
        return torch.arange(len(exact)), exact, torch.ones_like(exact)
    _, grid = finite_grid(fmt)
    index, code, weight = rounding_masses(exact / fmt.gap, torch.zeros(()), grid / fmt.gap, splines=2)
    taken = weight > 0
    return index[taken], grid[code[taken]], weight[taken]


class States:
    """The states of a part, numbered position by position, and their one-step laws."""

    def __init__(self, chain: Chain, part: Part) -> None:
        self.chain, self.space = chain, chain.space.part(part.positions, part.velocities)
        self.positions, self.velocities = len(self.space.x), len(self.space.v)
        exact = chain.grad(self.space.x).double().expand(self.space.x.shape)
        self.nodes = _force_nodes(exact, chain.gradient_format)

    def __len__(self) -> int:
        return self.positions * self.velocities

    def laws(self, low: int, high: int) -> Iterator[PairMasses]:
        """State, position and velocity that it goes to, mass; for the positions from ``low`` to ``high`` in chunks."""
        here = (self.nodes[0] >= low) & (self.nodes[0] < high)
        state = (self.nodes[0][here][:, None] * self.velocities + torch.arange(self.velocities)).flatten()
        force, weight = (part[here].repeat_interleave(self.velocities) for part in self.nodes[1:])
        for at, f, w in zip(state.split(_CHUNK), force.split(_CHUNK), weight.split(_CHUNK)):
            x, v = self.space.x[at // self.velocities], self.space.v[at % self.velocities]
            row, i, j, mass = pair_masses(self.chain.update, x, v, f, self.chain.flow, self.space)
            yield at[row], i, j, mass * w[row]


class Levels:
    """Moves level by level of ``band`` positions, dense; callable with the number of a level.

    Attributes:
        beyond: Probability of every state to go beyond the neighbouring levels; such moves are put on their far ends.
        middle: Level of the lowest potential.
        anchor: Index in it of the state at rest there.
    """

    def __init__(self, states: States, band: int) -> None:
        self.states, size = states, states.velocities
        self.starts = list(range(0, states.positions, band))
        self.ends = [*self.starts[1:], states.positions]
        self.beyond = torch.zeros(len(states), dtype=torch.float64)
        mode = int(potential_on(states.space.x, states.chain.grad).argmin())
        self.middle = mode // band
        rest = min(int((states.space.v < 0).sum()), size - 1)
        self.anchor = (mode - self.starts[self.middle]) * size + rest

    def __len__(self) -> int:
        return len(self.starts)

    def __call__(self, k: int) -> Level:
        """Moves of level ``k`` down, within, up."""
        start, end, size = self.starts[k], self.ends[k], self.states.velocities
        first, last = self.starts[max(k - 1, 0)], self.ends[min(k + 1, len(self) - 1)]
        moves = torch.zeros((end - start) * size, (last - first) * size, dtype=torch.float64)
        for state, i, j, mass in self.states.laws(start, end):
            outside = (i < first) | (i >= last)
            self.beyond.index_add_(0, state[outside], mass[outside])
            column = (i.clamp(first, last - 1) - first) * size + j
            moves.view(-1).index_add_(0, (state - start * size) * moves.shape[1] + column, mass)
        moves /= moves.sum(1, keepdim=True)
        cuts = [(start - first) * size, (end - start) * size, (last - end) * size]
        below, within, above = moves.split(cuts, dim=1)
        return below, within, above


class Entries:
    """Moves as a list of the entries that matter; callable with a law, for the law a step later."""

    def __init__(self, states: States) -> None:
        self.size, self.entries = len(states), []
        total = torch.zeros(self.size, dtype=torch.float64)
        for state, i, j, mass in states.laws(0, states.positions):
            likely = mass > _NEGLIGIBLE
            state, target, mass = state[likely], (i * states.velocities + j)[likely], mass[likely]
            total.index_add_(0, state, mass)
            self.entries.append((state.int(), target.int(), mass))
        for state, _, mass in self.entries:
            mass /= total[state]

    def __call__(self, law: Tensor) -> Tensor:
        """Law after one step of ``law``."""
        out = torch.zeros(self.size, dtype=torch.float64)
        for state, target, mass in self.entries:
            out.index_add_(0, target, law.index_select(0, state) * mass)
        return out
