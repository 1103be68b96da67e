r"""Split conformal prediction: sets and intervals whose coverage does not depend on the model being right.

Of n held-out points with scores :math:`s_i`, the :math:`\lceil (n+1)c \rceil`-th smallest is :math:`\hat q`. A new
point that is exchangeable with them has :math:`P(s \le \hat q) \ge c`, whatever the model; on average over held-out
sets, not for each of them, and not for each class or region of inputs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["SetScore", "class_scores", "conformal_quantile", "interval_scores", "prediction_sets"]

#: ``"threshold"``: one minus the probability of the class; ``"adaptive"``: probability of all classes at least as
#: probable.
SetScore = Literal["threshold", "adaptive"]


def conformal_quantile(scores: Tensor, coverage: float) -> float:
    r"""The :math:`\lceil (n+1)c \rceil`-th smallest of n scores.

    Args:
        scores: Scores of held-out points, shape ``(n,)``, none of them NaN.
        coverage: c, in (0, 1).

    Returns:
        The quantile.

    Raises:
        ValueError: If c is out of range, a score is NaN, or n is too small for c: it takes n >= c / (1 - c).

    Example:
        >>> conformal_quantile(torch.arange(1.0, 10.0), 0.8)
        8.0

    Reference:
        Vovk, Gammerman & Shafer, 2005; Lei et al., 2018, arXiv:1604.04173, theorem 2.2.
    """
    if not 0.0 < coverage < 1.0:
        raise ValueError(f"conformal: `coverage` must be in (0, 1), got {coverage}.")
    if scores.ndim != 1 or bool(scores.isnan().any()):
        raise ValueError(f"conformal: scores must be 1-D without NaN, got shape {tuple(scores.shape)}.")
    n = len(scores)
    rank = math.ceil((n + 1) * coverage - 1e-9)  # 0.9 * 10 must not become the 10th of 9
    if rank > n:
        needed = math.ceil(coverage / (1.0 - coverage) - 1e-9)
        raise ValueError(
            f"conformal: {n} held-out points cannot calibrate a coverage of {coverage}; it takes {needed} or more."
        )
    return float(scores.double().sort().values[rank - 1])


def class_scores(probabilities: Tensor, score: SetScore) -> Tensor:
    r"""Score of every class: how little the model expects it.

    Args:
        probabilities: Shape ``(n, classes)``.
        score: ``"threshold"``: :math:`1 - p_y`; ``"adaptive"``: :math:`\sum_{k: p_k \ge p_y} p_k`.

    Returns:
        float64, shape ``(n, classes)``.

    Raises:
        ValueError: If ``score`` or the shape is another one.

    Reference:
        Sadinle, Lei & Wasserman, 2019, arXiv:1609.00451 (threshold); Romano, Sesia & Candès, 2020, arXiv:2006.02544
        (adaptive, here without its randomization, hence on the safe side).
    """
    if probabilities.ndim != 2:
        raise ValueError(f"conformal: probabilities must have shape (n, classes), got {tuple(probabilities.shape)}.")
    p = probabilities.double()
    if score == "threshold":
        return 1.0 - p
    if score != "adaptive":
        raise ValueError(f"conformal: `score` must be 'threshold' or 'adaptive', got {score!r}.")
    ordered, order = p.sort(dim=1, descending=True, stable=True)
    return torch.empty_like(p).scatter_(1, order, ordered.cumsum(1))


def prediction_sets(probabilities: Tensor, quantile: float, score: SetScore) -> Tensor:
    """Classes whose score is at most ``quantile``, and always the most probable one: no set is empty.

    Args:
        probabilities: Shape ``(n, classes)``.
        quantile: Largest score that is let in, as calibrated.
        score: ``"threshold"`` or ``"adaptive"``.

    Returns:
        bool, shape ``(n, classes)``.

    Example:
        >>> prediction_sets(torch.tensor([[0.7, 0.2, 0.1]]), 0.85, "threshold")
        tensor([[ True,  True, False]])
    """
    inside = class_scores(probabilities, score) <= quantile
    return inside.scatter(1, probabilities.argmax(1, keepdim=True), True)


def interval_scores(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    r"""Distance of the targets in standard deviations, the largest over the outputs of a point.

    Args:
        mean: Shape ``(n, ...)``.
        variance: Same shape.
        targets: Same shape.

    Returns:
        float64, shape ``(n,)``. One quantile of it makes boxes that hold all outputs of a point at once.

    Raises:
        ValueError: If shapes differ, or a variance is not positive.
    """
    if mean.shape != targets.shape or mean.shape != variance.shape:
        raise ValueError(
            f"conformal: predictions have shape {tuple(mean.shape)}, targets {tuple(targets.shape)}; they must agree."
        )
    if not bool((variance > 0).all()):
        raise ValueError("conformal: a predicted variance is not > 0; give the ensemble a `noise_std`.")
    distance = (targets.double() - mean.double()).abs() / variance.double().sqrt()
    return distance.flatten(1).amax(1) if distance.ndim > 1 else distance
