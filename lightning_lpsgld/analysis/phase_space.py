r"""Exact stationary law of low-precision SGHMC in one dimension: the chain of (x, v) on two fixed-point grids.

The chain has up to :math:`2^{16}` states at 8 bits each. A short step moves the position by few gaps: positions in
order form levels between which the chain moves one at a time, and :mod:`.elimination` solves it directly, however
slowly it mixes. A step over many gaps mixes in few steps: :mod:`.extrapolation`. Only the part of the grids that the
chain visits is kept; how much is beyond is measured, and the part widened until that is negligible.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_lpsgld.analysis.elimination import stationary_by_levels
from lightning_lpsgld.analysis.extrapolation import stationary_by_steps
from lightning_lpsgld.analysis.onestep import finite_grid
from lightning_lpsgld.analysis.phase_moves import Chain, Entries, Levels, Part, States
from lightning_lpsgld.analysis.stationary import potential_on
from lightning_lpsgld.analysis.underdamped import Drift, PhaseGrid, UnderdampedUpdate, step_flow
from lightning_lpsgld.formats import FormatLike
from lightning_lpsgld.ops.flow import Flow

__all__ = ["underdamped_stationary_law"]

#: Levels of more states are not eliminated: such steps are long, and the law is found by stepping.
_LONG = 1024


@dataclass(frozen=True)
class _Setting:
    """η, T, γ and u."""

    lr: float
    temperature: float
    friction: float
    inverse_mass: float


def _heat(flow: Flow, space: PhaseGrid, update: str, speed: float) -> tuple[float, float]:
    """Variance that a step adds to position and velocity, rounding included: a guess, from above."""

    def rounded(sigma: float, gap: float) -> float:
        return min(gap * sigma, gap**2 / 4)

    position = rounded(flow.carry * speed + math.sqrt(flow.var_x), space.position_format.gap)
    velocity = rounded(math.sqrt(flow.var_v), space.velocity_format.gap) if update == "naive" else 0.0
    return position, velocity


def _jump(chain: Chain, tolerance: float) -> float:
    """Velocity that comes with a jump of a resting position, where Q^vc makes them often enough to count."""
    flow, gap = chain.flow, chain.space.position_format.gap
    if chain.update == "naive" or flow.cov == 0 or flow.var_x > gap**2 / 4:
        return 0.0
    often = flow.var_x / gap**2 / (1.0 - flow.keep) > tolerance
    return min(flow.cov / flow.var_x * gap, float(chain.space.v[-1])) if often else 0.0


def _first_part(chain: Chain, setting: _Setting, tolerance: float) -> Part:
    """Guess of the codes that the chain visits, as if the target were a Gaussian with rounding as a heat bath."""
    space, flow, mass = chain.space, chain.flow, setting.inverse_mass
    lr, gamma, reach = setting.lr, setting.friction, math.sqrt(-2.0 * math.log(tolerance))
    speed, warmth = math.sqrt(mass * setting.temperature), setting.temperature
    for _ in range(3):
        position, velocity = _heat(flow, space, chain.update, speed)
        kinetic = mass * setting.temperature + (velocity + mass * position) / lr / (2 * gamma)
        warmth = kinetic / mass + position / lr * gamma / (2 * mass)
        speed = math.sqrt(kinetic)
    jump = _jump(chain, tolerance)
    inside = (potential_on(space.x, chain.grad) <= reach**2 / 2 * warmth).nonzero().flatten()
    more = math.ceil(jump / gamma / space.position_format.gap) + 2
    fastest = math.ceil((reach * speed + jump) / space.velocity_format.gap) + 2
    zero = int((space.v < 0).sum())
    spread = flow.carry * speed + math.sqrt(flow.var_x)
    return Part(
        max(int(inside[0]) - more, 0),
        min(int(inside[-1]) + more + 1, len(space.x)),
        max(zero - fastest, 0),
        min(zero + fastest + 1, len(space.v)),
        math.ceil(reach * spread / space.position_format.gap) + 1,
    )


def _solve(chain: Chain, part: Part, tolerance: float) -> tuple[Tensor, float]:
    """Law on a part of the states, shape (positions, velocities), and the mass of moves that its levels cut off."""
    states, cut = States(chain, part), 0.0
    if part.band * states.velocities > _LONG:
        law = stationary_by_steps(Entries(states), _start(chain, states), tolerance / 100)
    else:
        levels = Levels(states, part.band)
        law = torch.cat(stationary_by_levels(levels, len(levels), levels.middle, levels.anchor))
        cut = float(law @ levels.beyond)
    return law.reshape(states.positions, states.velocities), cut


def _start(chain: Chain, states: States) -> Tensor:
    """The target, for a velocity of the variance that full precision would give it."""
    space, flow = states.space, chain.flow
    spread = flow.var_v / (1.0 - flow.keep**2)
    warmth = spread / (flow.kick / flow.carry)
    law = torch.exp(-potential_on(space.x, chain.grad) / warmth)[:, None] * torch.exp(-0.5 * space.v**2 / spread)
    return law.flatten() / law.sum()


def _widened(part: Part, law: Tensor, cut: float, chain: Chain, tolerance: float) -> Part:
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
        tolerance: Probability that may be lost at each edge of the states that are kept, between 1e-13 and 1e-3.

    Returns:
        The two grids in increasing order and the joint probabilities, float64, shape ``(2**W_x, 2**W_v)``; values that
        the chain visits with less than about ``tolerance`` have probability 0. Sum over the last axis for the law of
        the position, which :func:`.wasserstein2` and :func:`.moments` take.

    Raises:
        ValueError: If an argument is out of range, or the chain falls apart.
        TypeError: If a format is not a fixed point of at most 12 bits.

    Note:
        On one core at 8 bits, from below a second to ten for steps of up to 0.02 (cold targets have few states), and
        about a minute and 2 GB of memory where the position moves by ten gaps in a step.

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
    if not 1e-13 <= tolerance <= 1e-3:
        raise ValueError(f"`tolerance` must be in [1e-13, 1e-3], got {tolerance}.")
    flow = step_flow(update, drift, lr=lr, temperature=temperature, friction=friction, inverse_mass=inverse_mass)
    rounded = None if gradient_format is None else finite_grid(gradient_format)[0]
    chain = Chain(update, flow, PhaseGrid.of(weight_format, velocity_format), grad, rounded)
    part = _first_part(chain, _Setting(lr, temperature, friction, inverse_mass), tolerance)
    while True:
        law, cut = _solve(chain, part, tolerance)
        wider = _widened(part, law, cut, chain, tolerance)
        if wider == part:
            break
        part = wider
    joint = torch.zeros(len(chain.space.x), len(chain.space.v), dtype=torch.float64)
    joint[part.positions, part.velocities] = law
    return chain.space.x, chain.space.v, joint
