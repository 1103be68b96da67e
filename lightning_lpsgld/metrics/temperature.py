r"""Likelihood after temperature scaling: what a prediction is worth once its sharpness is set right.

.. math::
    \min_\beta \frac1n \sum_i \Bigl[\ln \sum_k p_{ik}^\beta - \beta \ln p_{i y_i}\Bigr], \qquad \beta = 1/T

The bracket is convex in :math:`\beta` with known derivatives, so sums at fixed :math:`\beta` determine the minimum: the
state has a fixed size whatever the number of predictions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.metrics.base import Score, zeros
from lightning_lpsgld.metrics.functional import check_predictions

__all__ = ["CalibratedNLL", "calibrated_nll"]

#: 1/T from 1/8 to 8, 33 values.
_BETAS = torch.logspace(-3, 3, 33, base=2.0, dtype=torch.float64)


def temperature_sums(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Sums over predictions of the scaled NLL and its two derivatives by 1/T, at each of the 33 values; ``(33, 3)``."""
    check_predictions(probabilities, targets)
    logs = probabilities.double().clamp(min=2.0**-126).log()
    chosen = (targets.double() * logs).sum(1) if targets.ndim == 2 else logs.gather(1, targets.long()[:, None])[:, 0]
    rows = []
    for beta in _BETAS.tolist():
        scaled = beta * logs
        normalizer = scaled.logsumexp(1)
        weights = (scaled - normalizer[:, None]).exp()
        first = (weights * logs).sum(1)
        second = (weights * (logs - first[:, None]).square()).sum(1)
        rows.append(torch.stack([(normalizer - beta * chosen).sum(), (first - chosen).sum(), second.sum()]))
    return torch.stack(rows)


def minimum_of_sums(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Least mean NLL and its temperature, from quintic interpolation between the values; float64 scalars."""
    sums = (sums / count).cpu()
    if not bool(sums.isfinite().all()):
        return sums.new_tensor(torch.nan), sums.new_tensor(torch.nan)
    cell = int((sums[:, 1] < 0).sum())  # the slope grows with beta: this is where it changes sign
    if cell in (0, len(_BETAS)):
        end = min(cell, len(_BETAS) - 1)
        return sums[end, 0], 1.0 / _BETAS[end]
    left, right = _BETAS[cell - 1], _BETAS[cell]
    h = right - left
    scale = torch.stack([torch.ones_like(h), h, h * h])
    data = torch.cat([sums[cell - 1] * scale, sums[cell] * scale])
    powers = torch.arange(6, dtype=torch.float64)
    derivative = powers * (powers - 1)
    at_zero = torch.diag(torch.tensor([1.0, 1.0, 2.0, 0, 0, 0], dtype=torch.float64))[:3]
    rows = torch.cat([at_zero, torch.ones(1, 6, dtype=torch.float64), powers[None], derivative[None]])
    coefficients = torch.linalg.solve(rows, data)
    low, high = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for _ in range(60):
        middle = 0.5 * (low + high)
        slope = (coefficients[1:] * powers[1:] * middle ** powers[:-1]).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return (coefficients * low**powers).sum(), 1.0 / (left + low * h)


def calibrated_nll(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean NLL at the temperature that is best for these predictions, and that temperature.

    The temperature is found on the same predictions: one number fitted to n of them, which flatters the score by about
    1/(2n) nats. It lies in [1/8, 8]; above 1 the predictions were too sure.

    Args:
        probabilities: Shape ``(n, classes)``; of an ensemble, the mean ones. Clamped at 2^-126.
        targets: Shape ``(n,)``, or ``(n, classes)`` if soft.

    Returns:
        NLL in nats and temperature, float64 scalars; NaN for no predictions.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.9, 0.1]]).expand(4, 2)
        >>> calibrated_nll(probabilities, torch.tensor([0, 0, 0, 1]))
        (tensor(0.5623, dtype=torch.float64), tensor(2.0000, dtype=torch.float64))

    Reference:
        Guo et al., 2017, arXiv:1706.04599; Ashukha et al., 2020, arXiv:2002.06470, section 4 (why ensembles are to be
        compared at their best temperature).
    """
    count = torch.tensor(float(len(targets)), dtype=torch.float64)
    return minimum_of_sums(temperature_sums(probabilities, targets).cpu(), count)


class CalibratedNLL(Score):
    """Mean NLL at the best temperature; see :func:`calibrated_nll`.

    State: sums at 33 temperatures, number of predictions. Added over ranks.

    Args:
        kwargs: Passed on to ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = CalibratedNLL()
        >>> metric.update(torch.tensor([[0.9, 0.1]]).expand(4, 2), torch.tensor([0, 0, 0, 1]))
        >>> metric.compute()
        tensor(0.5623, dtype=torch.float64)
    """

    sums: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", zeros(len(_BETAS), 3), dist_reduce_fx="sum")
        self.add_state("count", zeros(), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of shape ``(n, classes)`` and targets of shape ``(n,)``, or ``(n, classes)`` if soft."""
        self.sums += temperature_sums(probabilities, targets)
        self.count += len(targets)

    def compute(self) -> Tensor:
        """NLL in nats, float64."""
        return minimum_of_sums(self.sums, self.count.to(self.sums.device).cpu())[0]

    def temperature(self) -> Tensor:
        """The best temperature of what **this rank** has seen, float64."""
        return minimum_of_sums(self.sums, self.count.cpu())[1]
