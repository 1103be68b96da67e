r"""Exact stationary law of low-precision SGHMC in one dimension: the chain of (x, v) on two fixed-point grids.

The chain has up to :math:`2^{16}` states at 8 bits each. A step moves the position by few gaps, so positions in order
form levels between which the chain moves one at a time, and :mod:`.elimination` solves it directly. Only the part of
the grids that the chain visits is kept; how much is beyond is measured, and the part widened until it is negligible.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_lpsgld.analysis.elimination import Level, stationary_by_levels
from lightning_lpsgld.analysis.onestep import finite_grid, rounding_masses
from lightning_lpsgld.analysis.stationary import potential_on
from lightning_lpsgld.analysis.underdamped import Drift, PhaseGrid, UnderdampedUpdate, pair_masses, step_flow
from lightning_lpsgld.formats import FixedPoint, FormatLike
from lightning_lpsgld.ops.flow import Flow

__all__ = ["underdamped_stationary_law"]

#: States whose laws are computed together.
_CHUNK = 512
#: A first guess of the part keeps this many standard deviations.
_REACH = 6.5


@dataclass(frozen=True)
class _Chain:
    """One step of the sampler on a target."""

    update: UnderdampedUpdate
    flow: Flow
    space: PhaseGrid
    grad: Callable[[Tensor], Tensor]
    gradient_format: FixedPoint | None


@dataclass(frozen=True)
class _Part:
    """Codes that are kept, and how many positions make a level: ``low <= index < high``."""

    x_low: int
    x_high: int
    v_low: int
    v_high: int
    band: int

    @property
    def positions(self) -> slice:
        return slice(self.x_low, self.x_high)

    @property
    def velocities(self) -> slice:
        return slice(self.v_low, self.v_high)


def _heat(flow: Flow, space: PhaseGrid, update: str, speed: float) -> tuple[float, float]:
    """Variance that a step adds to position and velocity, rounding included: a guess, from above."""

    def rounded(sigma: float, gap: float) -> float:
        return min(gap * sigma, gap**2 / 4)

    position = rounded(flow.carry * speed + math.sqrt(flow.var_x), space.position_format.gap)
    velocity = rounded(math.sqrt(flow.var_v), space.velocity_format.gap) if update == "naive" else 0.0
    return position, velocity


def _first_part(chain: _Chain, lr: float, friction: float, inverse_mass: float, temperature: float) -> _Part:
    """Guess of the codes that the chain visits, as if the target were a Gaussian with rounding as a heat bath."""
    space, flow = chain.space, chain.flow
    potential = potential_on(space.x, chain.grad)
    rate, speed, warmth = 2 * friction * lr, math.sqrt(inverse_mass * temperature), temperature
    for _ in range(3):
        position, velocity = _heat(flow, space, chain.update, speed)
        kinetic = inverse_mass * temperature + velocity / rate + inverse_mass * position / lr / (2 * friction)
        warmth = kinetic / inverse_mass + position / lr * friction / (2 * inverse_mass)
        speed = math.sqrt(kinetic)
    inside = (potential <= _REACH**2 / 2 * warmth).nonzero().flatten()
    reach_v = math.ceil(_REACH * speed / space.velocity_format.gap) + 2
    zero = int((space.v < 0).sum())
    spread = flow.carry * speed + math.sqrt(flow.var_x)
    band = math.ceil(_REACH * spread / space.position_format.gap) + 1
    return _Part(
        max(int(inside[0]) - 2, 0),
        min(int(inside[-1]) + 3, len(space.x)),
        max(zero - reach_v, 0),
        min(zero + reach_v + 1, len(space.v)),
        band,
    )


def _force_nodes(exact: Tensor, fmt: FixedPoint | None) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the position, gradient and weight of every value that the rounded gradient can take there."""
    if fmt is None:
        return torch.arange(len(exact)), exact, torch.ones_like(exact)
    _, grid = finite_grid(fmt)
    index, code, weight = rounding_masses(exact / fmt.gap, torch.zeros(()), grid / fmt.gap, splines=2)
    taken = weight > 0
    return index[taken], grid[code[taken]], weight[taken]


class _Levels:
    """Moves of the chain on a part of its states, level by level."""

    def __init__(self, chain: _Chain, part: _Part) -> None:
        self.chain, self.space = chain, chain.space.part(part.positions, part.velocities)
        positions, self.velocities = len(self.space.x), len(self.space.v)
        self.starts = list(range(0, positions, part.band))
        self.ends = [*self.starts[1:], positions]
        self.nodes = _force_nodes(chain.grad(self.space.x).double().expand(positions), chain.gradient_format)
        self.beyond = torch.zeros(positions * self.velocities, dtype=torch.float64)
        potential = potential_on(self.space.x, chain.grad)
        mode = int(potential.argmin())
        self.middle = mode // part.band
        rest = int((self.space.v < 0).sum())
        self.anchor = (mode - self.starts[self.middle]) * self.velocities + min(rest, self.velocities - 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __call__(self, k: int) -> Level:
        start, end = self.starts[k], self.ends[k]
        first, last = self.starts[max(k - 1, 0)], self.ends[min(k + 1, len(self) - 1)]
        size = self.velocities
        moves = torch.zeros((end - start) * size, (last - first) * size, dtype=torch.float64)
        here = (self.nodes[0] >= start) & (self.nodes[0] < end)
        state = (self.nodes[0][here][:, None] * size + torch.arange(size)).flatten()
        force, weight = (part[here].repeat_interleave(size) for part in self.nodes[1:])
        for at, f, w in zip(state.split(_CHUNK), force.split(_CHUNK), weight.split(_CHUNK)):
            self._add(moves, at, f, w, start, first, last)
        moves /= moves.sum(1, keepdim=True)
        cuts = [(start - first) * size, (end - start) * size, (last - end) * size]
        below, within, above = moves.split(cuts, dim=1)
        return below, within, above

    def _add(self, moves: Tensor, at: Tensor, force: Tensor, weight: Tensor, start: int, first: int, last: int) -> None:
        """Add the laws of some states; positions beyond the neighbouring levels are put on their ends and counted."""
        size, chain = self.velocities, self.chain
        x, v = self.space.x[at // size], self.space.v[at % size]
        row, i, j, mass = pair_masses(chain.update, x, v, force, chain.flow, self.space)
        mass = mass * weight[row]
        outside = (i < first) | (i >= last)
        self.beyond.index_add_(0, at[row[outside]], mass[outside])
        column = (i.clamp(first, last - 1) - first) * size + j
        moves.view(-1).index_add_(0, (at[row] - start * size) * moves.shape[1] + column, mass)


def _solve(chain: _Chain, part: _Part) -> tuple[Tensor, float]:
    """Law on a part of the states, shape (positions, velocities), and the mass of moves that its levels cut off."""
    levels = _Levels(chain, part)
    laws = stationary_by_levels(levels, len(levels), levels.middle, levels.anchor)
    law = torch.cat(laws)
    return law.reshape(-1, levels.velocities), float(law @ levels.beyond)


def _widened(part: _Part, law: Tensor, cut: float, chain: _Chain, tolerance: float) -> _Part:
    """The part, wider on each side where it holds more than ``tolerance`` at an end that is not the format's."""
    more_x, more_v = (math.ceil(0.3 * n) + 1 for n in law.shape)
    new = part
    if float(law[0].sum()) > tolerance:
        new = replace(new, x_low=max(part.x_low - more_x, 0))
    if float(law[-1].sum()) > tolerance:
        new = replace(new, x_high=min(part.x_high + more_x, len(chain.space.x)))
    if float(law[:, 0].sum()) > tolerance:
        new = replace(new, v_low=max(part.v_low - more_v, 0))
    if float(law[:, -1].sum()) > tolerance:
        new = replace(new, v_high=min(part.v_high + more_v, len(chain.space.v)))
    return replace(new, band=part.band + math.ceil(part.band / 2)) if cut > tolerance else new


def underdamped_stationary_law(
    update: UnderdampedUpdate,
    weight_format: FormatLike,
    velocity_format: FormatLike,
    *,
    lr: float,
    temperature: float,
    friction: float,
    grad: Callable[[Tensor], Tensor],
    inverse_mass: float = 1.0,
    gradient_format: FormatLike | None = None,
    drift: Drift = "corrected",
    tolerance: float = 1e-9,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Exact long-run law of low-precision SGHMC in one dimension: position and velocity, each on its grid.

    Args:
        update: ``"naive"`` (naive SGHMCLP-L) or ``"vc"`` (VC SGHMCLP-L), velocity not rescaled, N = 1.
        weight_format: Fixed-point format of the position, at most 12 bits.
        velocity_format: Fixed-point format of the velocity, at most 12 bits; its range should hold some
            :math:`\sqrt{uT}`.
        lr: η > 0, time of a step.
        temperature: T > 0; the target is :math:`\exp(-(U(x) + v^2/2u)/T)`.
        friction: γ > 0.
        grad: Gradient of U, called on values of the weight's grid.
        inverse_mass: u > 0.
        gradient_format: Fixed-point format of the gradient (stochastic rounding); ``None``: full precision.
        drift: ``"corrected"``, or ``"paper"``: the printed sign, and for ``"vc"`` independent noise.
        tolerance: Probability that may be lost at each edge of the states that are kept.

    Returns:
        The two grids in increasing order and the joint probabilities, float64, shape ``(2**W_x, 2**W_v)``; values that
        the chain visits with less than about ``tolerance`` have probability 0. Sum over the last axis for the law of
        the position, which :func:`.wasserstein2` and :func:`.moments` take.

    Raises:
        ValueError: If an argument is out of range, or the chain falls apart.
        TypeError: If a format is not a fixed point of at most 12 bits.

    Note:
        Time and memory are those of a few dense factorisations per level of m positions, m the gaps that the position
        moves in a step: below 2 seconds for steps of up to 0.02 at 8 bits, a minute and 2 GB where a step crosses ten
        gaps.

    Example:
        >>> x, v, law = underdamped_stationary_law(
        ...     "vc", "fixed6.2", "fixed6.2", lr=0.3, temperature=1.0, friction=2.0, grad=lambda x: x
        ... )
        >>> law.shape, abs(float((law.sum(1) * x**2).sum()) - 1.0) < 0.2
        (torch.Size([64, 64]), True)

    Reference:
        The samplers: Wang, Chen, Song & Zhang, arXiv:2310.16320, equations 3 to 8.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be finite and > 0 for a stationary law of (x, v), got {temperature}.")
    flow = step_flow(update, drift, lr=lr, temperature=temperature, friction=friction, inverse_mass=inverse_mass)
    rounded = None if gradient_format is None else finite_grid(gradient_format)[0]
    chain = _Chain(update, flow, PhaseGrid.of(weight_format, velocity_format), grad, rounded)
    part = _first_part(chain, lr, friction, inverse_mass, temperature)
    while True:
        law, cut = _solve(chain, part)
        wider = _widened(part, law, cut, chain, tolerance)
        if wider == part:
            break
        part = wider
    joint = torch.zeros(len(chain.space.x), len(chain.space.v), dtype=torch.float64)
    joint[part.positions, part.velocities] = law
    return chain.space.x, chain.space.v, joint
