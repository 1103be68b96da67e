r"""Underdamped Langevin dynamics over one step with a frozen gradient, solved exactly: the coefficients.

The dynamics :math:`dv = -\gamma v\,dt - uG\,dt + \sqrt{2\gamma u\tau}\,dB,\; dx = v\,dt` have the invariant law
:math:`\exp(-(U(x) + \lVert v\rVert^2/2u)/\tau)`. Samplers round what comes out (``samplers.underdamped``), the exact
laws integrate over it (``analysis.underdamped``); the equations are written down in the former.

Reference:
    Cheng, Chatterji, Bartlett & Jordan, 2018, arXiv:1707.03663, appendix A (exact integration).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = ["Flow", "exact_flow"]

#: Terms of the power series, which is used for h < 1: the 30th is below 2**30 / 30! < 1e-23.
_TERMS = 30


@dataclass(frozen=True)
class Flow:
    """Coefficients of the step: the linear map of (x, v) and the covariance of its noise, all Python floats.

    Attributes:
        keep: e, factor of v in v'.
        carry: (1 - e)/γ, factor of v in x'.
        kick: (u/γ)(1 - e), factor of -G in v'.
        shift: (u/γ²)(h + e - 1), factor of -G in x'; negative for the published sign.
        var_v: Variance of the velocity's noise.
        var_x: Variance of the position's noise.
        cov: Their covariance.
    """

    keep: float
    carry: float
    kick: float
    shift: float
    var_v: float
    var_x: float
    cov: float

    def heated(self, factor: float) -> Flow:
        """The same map with all (co)variances times ``factor``."""
        return replace(self, var_v=self.var_v * factor, var_x=self.var_x * factor, cov=self.cov * factor)


def _moved(h: float) -> float:
    """``h + exp(-h) - 1`` for h < 1: the sum over k >= 2 of (-h)^k / k!."""
    terms, term = [], h * h / 2.0
    for k in range(2, 2 + _TERMS):
        terms.append(term)
        term *= -h / (k + 1)
    return math.fsum(terms)


def _spread(h: float) -> float:
    """``2h + 4exp(-h) - exp(-2h) - 3`` for h < 1: the sum over k >= 3 of (4 - 2^k)(-h)^k / k!."""
    terms, term = [], -(h**3) / 6.0
    for k in range(3, 3 + _TERMS):
        terms.append((4.0 - 2.0**k) * term)
        term *= -h / (k + 1)
    return math.fsum(terms)


def exact_flow(lr: float, friction: float, inverse_mass: float) -> Flow:
    r"""Coefficients over a time ``lr`` at :math:`\tau = 1`, to full float64 precision for every h = γη.

    The closed forms of the position cancel to order h² and h³; below h = 1 their power series are summed instead.

    Args:
        lr: η >= 0, time of a step.
        friction: γ > 0, per time.
        inverse_mass: u > 0.

    Returns:
        The coefficients, with the right sign and the joint noise.

    Example:
        >>> flow = exact_flow(1e-6, 1.0, 1.0)
        >>> abs(flow.var_x / (2 / 3 * 1e-18) - 1) < 1e-6
        True
    """
    h, gamma, u = friction * lr, friction, inverse_mass
    lost = -math.expm1(-h)  # 1 - e
    if h < 1.0:
        moved, spread = _moved(h), _spread(h)
    else:
        e = math.exp(-h)
        moved, spread = h + e - 1.0, 2.0 * h + 4.0 * e - e * e - 3.0
    return Flow(
        keep=math.exp(-h),
        carry=lost / gamma,
        kick=u / gamma * lost,
        shift=u / gamma**2 * moved,
        var_v=-u * math.expm1(-2.0 * h),
        var_x=u / gamma**2 * spread,
        cov=u / gamma * lost * lost,
    )
