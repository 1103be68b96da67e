r"""A Gaussian that is rounded: convolutions with cardinal B-splines, in closed form.

Nearest rounding is the box :math:`B_1`, stochastic rounding the hat :math:`B_2`, and the large-variance branch of Q^vc
(nearest, then the categorical draw of variance :math:`\Delta^2/4`) the quadratic :math:`B_3`. With :math:`Y \sim
N(s, t)` in units of the gap,

.. math::
    P(k) = E\,B_n(Y - k) = \sum_{j=0}^n (-1)^j \binom nj\, h_{n-1}(k - \tfrac n2 + j), \qquad
    h_m(x) = E\,[(Y - x)_+^m] / m!
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["NOISE_REACH", "four_points", "spline_masses", "upper_moment"]

_SQRT_2PI = math.sqrt(2.0 * math.pi)
#: A law out of a Gaussian is followed for this many standard deviations; beyond is less than 1e-20.
NOISE_REACH = 9.5


def upper_moment(distance: Tensor, sigma: Tensor, order: int) -> Tensor:
    r""":math:`h_m(x)` for :math:`Y - x \sim N(-distance, sigma^2)`, exact for every sign of ``distance``.

    Args:
        distance: x - E Y, float64.
        sigma: Standard deviation > 0, broadcasts to ``distance``.
        order: m, from 0 to 2.

    Returns:
        :math:`E\,[(Y - x)_+^m] / m!`, float64.
    """
    a = distance.abs() / sigma
    density, tail = torch.exp(-0.5 * a * a) / _SQRT_2PI, 0.5 * torch.erfc(a / math.sqrt(2.0))
    below = distance < 0
    if order == 0:
        return torch.where(below, 1.0 - tail, tail)
    if order == 1:
        far = sigma * (density - a * tail)
        return torch.where(below, far - distance, far)
    far = sigma**2 * ((1.0 + a * a) * tail - a * density) / 2
    return torch.where(below, (distance**2 + sigma**2) / 2 - far, far)


def spline_masses(mean: Tensor, variance: Tensor, splines: int) -> tuple[Tensor, Tensor]:
    r"""Law of ``round(mean + N(0, variance))``; everything in units of the gap.

    Args:
        mean: Means s, float64, shape ``(M,)``.
        variance: Variances t >= 0 that broadcast to ``mean``.
        splines: 1: nearest rounding. 2: stochastic rounding. 3: nearest rounding and then Q^vc's categorical draw.

    Returns:
        Codes and their probabilities, float64, both of shape ``(M, w)``; what lies outside has less than 1e-20.
    """
    sigma = torch.as_tensor(variance, dtype=torch.float64).sqrt().expand(mean.shape).clamp(min=1e-150)
    half = math.ceil(NOISE_REACH * float(sigma.max()) + splines / 2) if mean.numel() else 0
    offsets = torch.arange(-half, half + 1, dtype=torch.float64, device=mean.device)
    targets = mean.round()[:, None] + offsets
    # By symmetry every code is computed from the side on which it is in the tail: no cancellation far from the mean.
    distance = (targets - mean[:, None]).abs()
    mass = torch.zeros_like(distance)
    for j in range(splines + 1):
        sign = (-1) ** j * math.comb(splines, j)
        mass += sign * upper_moment(distance - splines / 2 + j, sigma[:, None], splines - 1)
    return targets, mass.clamp_(min=0.0)


def four_points(scaled: Tensor, corrective: Tensor) -> tuple[Tensor, Tensor]:
    """Law of stochastic rounding and then a categorical draw of variance ``corrective``; in units of the gap.

    Args:
        scaled: Means, float64, shape ``(M,)``.
        corrective: Variances of the draw, in [0, 1/4], shape ``(M,)``.

    Returns:
        Codes and their probabilities, float64, both of shape ``(M, 4)``.
    """
    lower = scaled.floor()
    p, side = scaled - lower, corrective / 2
    rest = 1.0 - 2.0 * side
    masses = torch.stack([(1 - p) * side, (1 - p) * rest + p * side, p * rest + (1 - p) * side, p * side], dim=-1)
    return lower[..., None] + torch.arange(-1.0, 3.0, dtype=torch.float64, device=scaled.device), masses
