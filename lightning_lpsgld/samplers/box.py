"""Whether the box of HALP's offsets fits the loss: mu against the curvature that the steps meet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "STEP_GROWTH", "badly_used", "global_norm", "measured_curvature", "misfit", "outgrown", "scalar",
    "thermal_gradient",
]  # fmt: skip

#: Growth of the full gradient over the smallest one at a centre, with a loss above the first, that is a divergence.
CENTRE_GROWTH = 10.0
#: The same, where the loss is above the first by more than :data:`LOSS_GROWTH` times its magnitude: gradients of a
#: cross-entropy are bounded, so that they alone do not show it.
CENTRE_GROWTH_WITH_LOSS = 2.0
LOSS_GROWTH = 3.0
#: Share of offsets at the edge of the box that is worth a warning.
AT_THE_EDGE = 0.2
#: Growth of the corrected gradient over that of its centre, within one inner loop.
STEP_GROWTH = 100.0


def global_norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm over tensors of any shapes, in float64; 0 for none."""
    if not tensors:
        return 0.0
    return float(torch.stack([t.detach().double().norm().to(tensors[0].device) for t in tensors]).norm())


def measured_curvature(
    gradients: Sequence[tuple[Tensor, Tensor]], points: Sequence[tuple[Tensor, Tensor]]
) -> float | None:
    """Norm of the change of a batch's gradient between two points over their distance; ``None`` if they are one point.

    Args:
        gradients: Pairs of tensors: of the point and of the centre.
        points: The same of the parameters.
    """
    distance = global_norm([a - b for a, b in points])
    return global_norm([a - b for a, b in gradients]) / distance if distance > 0 else None


def thermal_gradient(curvature: float | None, heat: float) -> float:
    r"""Norm that noise alone gives a gradient, :math:`\sqrt{L\,dT/N}`, for curvature L and heat dT/N.

    Infinite where the curvature is not known and T > 0, so that nothing is concluded from a growth.
    """
    if heat == 0:
        return 0.0
    return math.inf if curvature is None else math.sqrt(curvature * heat)


def scalar(loss: object) -> float | None:
    """A closure's value as a float; ``None`` where it is no single number."""
    if isinstance(loss, Tensor):
        return float(loss) if loss.numel() == 1 else None
    return float(loss) if isinstance(loss, (float, int)) else None


def badly_used(codes: Sequence[Tensor], limit: int) -> str | None:
    """What offsets at the end of an inner loop say about their box, with the remedy; ``None`` if it fits.

    Args:
        codes: Integer tensors.
        limit: Largest magnitude of a code.
    """
    count = sum(c.numel() for c in codes)
    edge = sum(int((c.abs() == limit).sum()) for c in codes)
    if count and edge > AT_THE_EDGE * count:
        return (
            f"{100 * edge / count:.0f} % of the offsets ended the inner loop at the edge of their box, so that steps "
            "are cut short: mu is above the curvature of the loss. Lower it, or use offset_format='bfp8' (no box)."
        )
    if count and not any(bool(c.any()) for c in codes):
        return (
            "not one offset has left the centre in an inner loop: the gap |gradient|/(code_max mu) is too coarse for "
            "these steps. Raise mu towards the curvature of the loss, or use offset_format='bfp8'."
        )
    return None


def outgrown(norm: float, least: float, loss: float | None, first: float | None, thermal_loss: float) -> bool:
    """Whether a full gradient of norm ``norm`` and its loss are those of a run that diverges.

    Args:
        norm: Of the full gradient at the new centre.
        least: The smallest one so far, or what temperature gives it, if that is more.
        loss: The full loss there, where it is known.
        first: That at the first centre.
        thermal_loss: What temperature adds to a loss, dT/2N.
    """
    if loss is None or first is None:
        return norm > CENTRE_GROWTH * least
    if loss - first > LOSS_GROWTH * (abs(first) + thermal_loss):
        return norm > CENTRE_GROWTH_WITH_LOSS * least
    return loss > first and norm > CENTRE_GROWTH * least


def misfit(mu: float, code_max: int, curvature: float | None, what: str) -> str:
    """Message of a divergence: what was seen, why, and the way out."""
    seen, near = "", "Raise `mu` towards the curvature of the loss"
    if curvature is not None:
        seen = f" The curvature met on the way is about {curvature:.2g}, {curvature / mu:.2g} times mu."
        near = f"Take mu={curvature:.1g} or so" if curvature > mu else "Lower the learning rate, or raise mu"
    return (
        f"HALP diverges: {what}. With mu = {mu:g} offsets lie on a grid of gap |gradient|/({code_max} mu), and its "
        f"rounding errors outgrow what the steps gain.{seen} {near} (a larger mu: finer grid, smaller box), use "
        "offset_format='bfp8', which needs no mu, or lower the learning rate."
    )
