r"""Stationary law of a long chain whose states are in levels and which moves by at most one level a step.

The transition matrix is block tridiagonal. Levels are eliminated from both ends towards one in the middle: with the
states of all outer levels gone, what is left of level k is the chain watched only while it is at k or further in,

.. math::
    S_{k+1} = A_{k+1} + L_{k+1} (1 - S_k)^{-1} U_k

with A the moves within a level, U those up and L those down. The cost is one dense factorisation per level instead of
one of the whole chain; nothing is iterated, so slow mixing costs nothing. Diagonals of 1 − S are sums of what leaves a
state, as in the elimination of Grassmann, Taksar and Heyman, not differences from 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Level", "stationary_by_levels"]

#: Moves of a level: to the level below, within it, to the level above; rows are its states.
Level = tuple[Tensor, Tensor, Tensor]


def _over_remaining(entering: Tensor, within: Tensor, leaving: Tensor) -> Tensor:
    """``entering (1 - within)^-1``: expected visits, ``leaving`` being each state's probability to leave for good."""
    system = -within
    system.diagonal().zero_()
    system.diagonal().copy_(leaving - system.sum(1))
    visits, singular = torch.linalg.solve_ex(system, entering, left=False)
    if bool(singular) or not bool(visits.isfinite().all()):
        raise ValueError(
            "The chain falls apart: states are left with no way to the middle of the target, so there is no single "
            "stationary law in floating point. Raise the temperature or the step size, or widen a range."
        )
    return visits.clamp_(min=0.0)


def _stationary_within(matrix: Tensor, anchor: int) -> Tensor:
    """Stationary law of a stochastic matrix, by the visits between two returns to ``anchor``."""
    others = torch.arange(len(matrix)) != anchor
    visits = _over_remaining(matrix[anchor, others][None], matrix[others][:, others], matrix[others, anchor])
    law = torch.ones(len(matrix), dtype=torch.float64)
    law[others] = visits[0]
    return law


def stationary_by_levels(level: Callable[[int], Level], count: int, middle: int, anchor: int) -> list[Tensor]:
    """Stationary law of a block tridiagonal chain.

    Args:
        level: The moves of a level, dense float64 matrices; called once per level. Those below the first level and
            above the last have no columns.
        count: Number of levels.
        middle: Level to which the others are reduced: one with likely states, or outer levels cannot be left.
        anchor: Index within it of a likely state.

    Returns:
        Probabilities of the states of each level; the sum over all is 1.

    Raises:
        ValueError: If states are left with no way to the middle.

    Note:
        Behind a barrier that is crossed with probability p, probabilities have a relative error of about 1e-16 / p.

    Example:
        >>> import torch
        >>> none, p = torch.zeros(1, 0).double(), torch.tensor([[1.0]]).double()
        >>> moves = [(none, 0.5 * p, 0.5 * p), (0.25 * p, 0.75 * p, none)]
        >>> [round(float(law), 4) for law in stationary_by_levels(moves.__getitem__, 2, 1, 0)]
        [0.3333, 0.6667]
    """
    down, stay, up = level(middle)
    visits: dict[int, Tensor] = {}

    def inwards(numbers: range, up_index: int) -> Tensor | float:
        """Eliminate levels in turn; returns what they add to the moves within the middle level."""
        gain: Tensor | float = 0.0
        held = level(numbers[0]) if len(numbers) else None
        for k in numbers:
            assert held is not None
            inner = k + up_index - 1
            following = (down, stay, up) if inner == middle else level(inner)
            entering = following[2 - up_index]
            visits[k] = _over_remaining(entering, held[1] + gain, held[up_index].sum(1))
            gain, held = visits[k] @ held[up_index], following
        return gain

    watched = stay + inwards(range(middle), 2) + inwards(range(count - 1, middle, -1), 0)
    laws = {middle: _stationary_within(watched, anchor)}
    for k in range(middle - 1, -1, -1):
        laws[k] = laws[k + 1] @ visits[k]
    for k in range(middle + 1, count):
        laws[k] = laws[k - 1] @ visits[k]
    total = sum(float(law.sum()) for law in laws.values())
    return [laws[k] / total for k in range(count)]
