r"""Stationary law of a chain that mixes fast but moves far: its own steps, extrapolated.

With :math:`p_{k+1} = p_k P`, the combination :math:`\sum_k c_k p_k`, :math:`\sum_k c_k = 1`, whose step is smallest in
the 2-norm is taken as the next start (reduced rank extrapolation, a Krylov method). What is left falls as for
Chebyshev polynomials: a relaxation time of τ steps costs about :math:`\sqrt\tau` of them per digit while that is less
than the window, and about a tenth of what plain stepping takes beyond.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["stationary_by_steps"]

#: Steps between two extrapolations.
_WINDOW = 12
_CYCLES = 400


def _extrapolated(laws: list[Tensor]) -> Tensor:
    """The combination of all but the last law with the smallest step, as a law."""
    history = torch.stack(laws, dim=1)
    moves = history.diff(dim=1)
    turns = moves.diff(dim=1)
    # QR of the turns, with columns of very different sizes made equal: they shrink as the steps converge.
    scale = turns.norm(dim=0).clamp(min=1e-300)
    solution = torch.linalg.lstsq(turns / scale, moves[:, :1]).solution[:, 0] / scale
    law = (history[:, 0] - moves[:, :-1] @ solution).clamp(min=0.0)
    return law / law.sum()


def stationary_by_steps(step: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> Tensor:
    """Stationary law of a chain given by its step.

    Args:
        step: Law after one step of a given law; float64 vectors.
        start: A law to begin with, shape ``(n,)``.
        tolerance: Largest sum of absolute changes that a step may still make.

    Returns:
        Probabilities, shape ``(n,)``. Their error is about ``tolerance`` times the chain's relaxation time in steps.

    Raises:
        ValueError: If 4,800 steps do not get there.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).double()
        >>> law = stationary_by_steps(lambda p: p @ matrix, torch.tensor([1.0, 0.0]).double(), 1e-12)
        >>> [round(float(p), 6) for p in law]
        [0.333333, 0.666667]

    Reference:
        Sidi, 2017, "Vector Extrapolation Methods with Applications", SIAM, chapter 2.
    """
    law, change = start / start.sum(), float("inf")
    for _ in range(_CYCLES):
        laws = [law]
        for _ in range(_WINDOW):
            laws.append(step(laws[-1]))
            change = float((laws[-1] - laws[-2]).abs().sum())
            if change <= tolerance:
                return laws[-1] / laws[-1].sum()
        law = _extrapolated(laws)
    raise ValueError(
        f"The law still changes by {change:.1e} a step after {_CYCLES * _WINDOW} steps; asked for are {tolerance:.1e}. "
        f"It mixes too slowly for its long moves: lower the step size, raise the temperature or take a coarser grid."
    )
