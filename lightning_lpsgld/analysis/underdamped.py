r"""Exact one-step laws of low-precision SGHMC: from (x, v) on two grids, every (x', v') with its probability.

Mean and covariance before rounding are those of :mod:`lightning_lpsgld.ops.flow`. What rounding makes of them:

* **naive**: a correlated Gaussian pair, each rounded stochastically. With B₂ the hat of :mod:`.onestep`,

  .. math::
      P(i, j) = E\,\bigl[B_2(X - i)\, B_2(V - j)\bigr]
              = \int B_2(V_z - j)\; P\bigl(i \mid s_x + \beta z,\ t_{x \mid v}\bigr)\, \varphi(z)\, dz

  The inner law is a closed form. The integral over the velocity's noise is split where B₂ has a kink; between kinks
  the integrand is analytic with a scale of about half a standard deviation, and Gauss and Legendre's rule on panels of
  at most one standard deviation errs by less than 1e-9 of each probability (1e-12 where measured).
* **vc**: the position is Q^vc of its mean, and given x' the velocity is Q^vc of its conditional mean and variance: a
  product of two closed forms, no quadrature.

Draws are ideal and arithmetic is float64, where the samplers compute means in the dtype of the velocity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_lpsgld.analysis.onestep import finite_grid, vc_masses
from lightning_lpsgld.formats import FixedPoint, FormatLike
from lightning_lpsgld.ops.flow import Flow, exact_flow
from lightning_lpsgld.ops.reference import variance_plan

__all__ = ["Drift", "PairMasses", "PhaseGrid", "UnderdampedUpdate", "pair_masses", "step_flow", "underdamped_law"]

#: How position and velocity are rounded: noise and then stochastic rounding, or Q^vc.
UnderdampedUpdate = Literal["naive", "vc"]
#: Mean of a step: that of the exact flow, or the published one.
Drift = Literal["corrected", "paper"]

#: Flat coordinate form of laws of a pair: row, index of the position's code, of the velocity's code, mass.
PairMasses = tuple[Tensor, Tensor, Tensor, Tensor]

#: Noise of the naive form is followed for this many standard deviations; beyond is less than 3e-12.
_REACH = 7.0
#: Positions less likely than this are left out of the product of the vc form.
_NEGLIGIBLE = 1e-17
#: Widest panel, in standard deviations -> points of the rule on it.
_RULES = ((0.125, 3), (0.25, 4), (1.0, 8))
#: Numbers held at once.
_CHUNK = 500_000


@dataclass(frozen=True)
class PhaseGrid:
    """The values that position and velocity can take: all of their formats, or a part of them.

    Attributes:
        position_format: Format of the position.
        velocity_format: Format of the velocity.
        x: Positions in increasing order, one gap apart, float64; outcomes beyond are put on the first or the last.
        v: Velocities, likewise.
    """

    position_format: FixedPoint
    velocity_format: FixedPoint
    x: Tensor
    v: Tensor

    @classmethod
    def of(cls, weight_format: FormatLike, velocity_format: FormatLike) -> PhaseGrid:
        """All values of two fixed-point formats of at most 12 bits."""
        (position, x), (velocity, v) = finite_grid(weight_format), finite_grid(velocity_format)
        return cls(position, velocity, x, v)

    def part(self, positions: slice, velocities: slice) -> PhaseGrid:
        """The same formats, with outcomes confined to some of their values."""
        return replace(self, x=self.x[positions], v=self.v[velocities])


def step_flow(
    update: UnderdampedUpdate, drift: Drift, *, lr: float, temperature: float, friction: float, inverse_mass: float
) -> Flow:
    """Coefficients of a step at N = 1, as the sampler makes them.

    Raises:
        ValueError: If ``update`` or ``drift`` is unknown or a number is out of range.
    """
    for what, value, allowed in (("update", update, UnderdampedUpdate), ("drift", drift, Drift)):
        if value not in get_args(allowed):
            raise ValueError(f"`{what}` must be one of {get_args(allowed)}, got {value!r}.")
    for name, number in (("lr", lr), ("friction", friction), ("inverse_mass", inverse_mass)):
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"`{name}` must be finite and > 0, got {number}.")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"`temperature` must be finite and >= 0, got {temperature}.")
    flow = exact_flow(lr, friction, inverse_mass).heated(temperature)
    if drift == "paper":
        flow = replace(flow, shift=-flow.shift, cov=0.0 if update == "vc" else flow.cov)
    return flow


def pair_masses(
    update: UnderdampedUpdate, x: Tensor, v: Tensor, force: Tensor, flow: Flow, space: PhaseGrid
) -> PairMasses:
    """As :func:`underdamped_law`, flat; entries of one outcome add up.

    Args:
        update: ``"naive"`` or ``"vc"``.
        x: Positions, float64, shape ``(M,)``.
        v: Velocities, shape ``(M,)``.
        force: Gradient of U at them, rounded if it is, shape ``(M,)``.
        flow: Coefficients; see :func:`step_flow`.
        space: Where outcomes are put.

    Returns:
        Row, index into ``space.x``, index into ``space.v``, mass.
    """
    mean_x = x + flow.carry * v - flow.shift * force
    mean_v = flow.keep * v - flow.kick * force
    return (_naive if update == "naive" else _corrected)(mean_x, mean_v, flow, space)


def underdamped_law(
    update: UnderdampedUpdate,
    weight_format: FormatLike,
    velocity_format: FormatLike,
    x: Tensor,
    v: Tensor,
    force: Tensor,
    *,
    lr: float,
    temperature: float,
    friction: float,
    inverse_mass: float = 1.0,
    drift: Drift = "corrected",
) -> Tensor:
    r"""Law of one step of low-precision SGHMC from given states: one coordinate, N = 1, velocity not rescaled.

    Args:
        update: ``"naive"`` (naive SGHMCLP-L) or ``"vc"`` (VC SGHMCLP-L).
        weight_format: Fixed-point format of the position, at most 12 bits.
        velocity_format: Fixed-point format of the velocity, at most 12 bits.
        x: Positions on their grid, shape ``(M,)``.
        v: Velocities on theirs, shape ``(M,)``, position units per unit of time.
        force: Gradient of U (as the step sees it: noisy, rounded), shape ``(M,)``.
        lr: η > 0, time of a step.
        temperature: T >= 0; the target is :math:`\exp(-(U + v^2/2u)/T)`.
        friction: γ > 0.
        inverse_mass: u > 0.
        drift: ``"corrected"``, or ``"paper"``: the printed sign, and for ``"vc"`` independent noise.

    Returns:
        Probabilities, float64, shape ``(M, 2**W_x, 2**W_v)``, codes in increasing order. ``"vc"`` is exact to rounding,
        ``"naive"`` to 1e-9.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If a format is not a fixed point of at most 12 bits.

    Example:
        >>> zero = torch.zeros(1)
        >>> law = underdamped_law(
        ...     "vc", "fixed4.2", "fixed4.2", zero, zero, zero, lr=0.1, temperature=0.1, friction=3.0
        ... )
        >>> law.shape, round(float(law.sum()), 12)
        (torch.Size([1, 16, 16]), 1.0)

    Reference:
        Wang, Chen, Song & Zhang, arXiv:2310.16320, equations 3 to 8, with the right sign and joint noise.
    """
    space = PhaseGrid.of(weight_format, velocity_format)
    flow = step_flow(update, drift, lr=lr, temperature=temperature, friction=friction, inverse_mass=inverse_mass)
    row, i, j, mass = pair_masses(update, x.double(), v.double(), force.double(), flow, space)
    shape = (len(x), len(space.x), len(space.v))
    flat = torch.zeros(math.prod(shape), dtype=torch.float64)
    return flat.index_add_(0, (row * shape[1] + i) * shape[2] + j, mass).reshape(shape)


def _corrected(mean_x: Tensor, mean_v: Tensor, flow: Flow, space: PhaseGrid) -> PairMasses:
    """Q^vc of the position, then Q^vc of the velocity given the position that came out."""
    fmt = space.position_format
    row, i, mass = vc_masses(mean_x, flow.var_x, fmt, space.x)
    likely = mass > _NEGLIGIBLE
    row, i, mass = row[likely], i[likely], mass[likely]
    slope = torch.zeros_like(mean_x)
    if flow.cov > 0:
        slope = flow.cov / (variance_plan(mean_x, flow.var_x, fmt).achieved * fmt.gap**2)
    variance = (flow.var_v - flow.cov * slope).clamp(min=0.0)
    given = mean_v[row] + slope[row] * (space.x[i] - mean_x.clamp(fmt.min, fmt.max)[row])
    pair, j, share = vc_masses(given, variance[row], space.velocity_format, space.v)
    return row[pair], i[pair], j, mass[pair] * share


# --------------------------------------------------------------------------------------------------------- naive


def _naive(mean_x: Tensor, mean_v: Tensor, flow: Flow, space: PhaseGrid) -> PairMasses:
    """The integral over the velocity's noise, in chunks of states that bound the memory."""
    sigma_x, sigma_v = (math.sqrt(v) for v in (flow.var_x, flow.var_v))
    width = 2 * math.ceil(_REACH * sigma_x / space.position_format.gap) + 7
    cells = math.ceil(2 * _REACH * sigma_v / space.velocity_format.gap) + 2
    size = max(1, _CHUNK // (width * cells * (8 if cells > 40 else 128)))
    parts, start = [], 0
    for s_x, s_v in zip(mean_x.split(size), mean_v.split(size)):
        row, i, j, mass = _naive_chunk(s_x, s_v, flow, space)
        parts.append((row + start, i, j, mass))
        start += len(s_x)
    row, i, j, mass = (torch.cat([part[k] for part in parts]) for k in range(4))
    return row, i, j, mass


def _naive_chunk(mean_x: Tensor, mean_v: Tensor, flow: Flow, space: PhaseGrid) -> PairMasses:
    gap_x, gap_v = space.position_format.gap, space.velocity_format.gap
    cell, z, weight, part = _velocity_nodes(mean_v / gap_v, max(math.sqrt(flow.var_v) / gap_v, 1e-150))
    slope = flow.cov / math.sqrt(flow.var_v) / gap_x if flow.cov > 0 else 0.0
    rest = flow.var_x - (flow.cov**2 / flow.var_v if flow.cov > 0 else 0.0)
    centre = (mean_x / gap_x).round()
    half = math.ceil(_REACH * math.sqrt(flow.var_x) / gap_x) + 2
    targets = centre[:, None] + torch.arange(-half, half + 1, dtype=torch.float64)
    offset = (mean_x / gap_x - centre)[:, None, None] + slope * z
    law = _hat_law(offset, max(math.sqrt(max(rest, 0.0)) / gap_x, 1e-150), half) * weight[..., None]
    # A velocity in cell [c, c+1] goes to c + 1 with the part of the cell that it has passed, else to c.
    upper = (law * part[..., None]).sum(2)
    lower = law.sum(2) - upper
    mass = torch.nn.functional.pad(lower, (0, 0, 0, 1)) + torch.nn.functional.pad(upper, (0, 0, 1, 0))
    mass = mass.clamp_(min=0.0) / mass.sum((1, 2), keepdim=True)
    codes = torch.cat([cell, cell[:, -1:] + 1], dim=1)
    i = _index(targets, space.x / gap_x)[:, None, :].expand_as(mass)
    j = _index(codes, space.v / gap_v)[:, :, None].expand_as(mass)
    row = torch.arange(len(mean_x))[:, None, None].expand_as(mass)
    keep = mass > _NEGLIGIBLE
    return row[keep], i[keep], j[keep], mass[keep]


def _index(targets: Tensor, codes: Tensor) -> Tensor:
    return (targets.clamp(float(codes[0]), float(codes[-1])) - codes[0]).long()


def _velocity_nodes(mean: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells between codes that the velocity reaches, and in each: nodes z, weights, and the part of the cell passed.

    Args:
        mean: In gaps, shape ``(M,)``.
        sigma: In gaps, > 0.

    Returns:
        Lower end of the cells, shape ``(M, C)``; the others of shape ``(M, C, Q)``. Cells out of reach weigh 0.
    """
    panels = math.ceil(min(1.0 / sigma, 2 * _REACH))
    widest = min(1.0 / sigma, 2 * _REACH) / panels
    nodes, weights = np.polynomial.legendre.leggauss(next(p for limit, p in _RULES if widest <= limit))
    unit = (torch.arange(panels, dtype=torch.float64)[:, None] + (torch.from_numpy(nodes) + 1) / 2).flatten() / panels
    share = (torch.from_numpy(weights) / 2).repeat(panels) / panels
    count = math.ceil(2 * _REACH * sigma) + 2 if sigma > 1e-3 else 2
    first = (mean - _REACH * sigma).floor() if sigma > 1e-3 else (mean - 0.5).floor()
    cell = first[:, None] + torch.arange(count, dtype=torch.float64)
    ends = ((cell - mean[:, None]) / sigma).clamp(-_REACH, _REACH), ((cell + 1 - mean[:, None]) / sigma)
    low, high = ends[0], ends[1].clamp(-_REACH, _REACH)
    z = low[..., None] + (high - low)[..., None] * unit
    weight = (high - low)[..., None] * share * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    part = (mean[:, None, None] + sigma * z - cell[..., None]).clamp(0.0, 1.0)
    return cell, z, weight, part


def _hat_law(offset: Tensor, sigma: float, half: int) -> Tensor:
    """Stochastic rounding of N(offset, sigma²), in gaps: mass on the codes -half ... half along a new last axis.

    The second difference of E (Y - k)₊. Absolute errors of 1e-15 times ``half``, which the averages here allow.
    """
    distance = offset[..., None] - torch.arange(-half - 1, half + 2, dtype=torch.float64)
    a = distance / sigma
    ramp = distance * (0.5 * torch.erfc(-a / math.sqrt(2.0))) + sigma / math.sqrt(2 * math.pi) * torch.exp(-0.5 * a * a)
    return ramp[..., :-2] - 2 * ramp[..., 1:-1] + ramp[..., 2:]
