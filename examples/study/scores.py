"""Scores of predicted probabilities, the calibrated log likelihood among them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.metrics import brier_score, calibration_error, categorical_nll

__all__ = ["calibrated_nll", "scores_of"]

#: Random halvings of the test set over which the calibrated NLL is averaged.
_HALVINGS = 5


def _fitted_temperature(logs: Tensor, targets: Tensor) -> Tensor:
    """The temperature that divides log-probabilities so that the NLL is least; the NLL is convex in its inverse."""
    inverse = torch.ones((), dtype=logs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logs * inverse, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return inverse.detach()


def calibrated_nll(probabilities: Tensor, targets: Tensor) -> float:
    """Negative log likelihood after temperature scaling on the other half of the test set, averaged over halvings.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Shape ``(n,)``.

    Reference:
        Ashukha et al., 2020, "Pitfalls of in-domain uncertainty estimation", arXiv:2002.06470, section 4.
    """
    logs = probabilities.double().clamp(min=1e-30).log()
    values = []
    for seed in range(_HALVINGS):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        halves = order.chunk(2)
        for fitted, scored in (halves, halves[::-1]):
            inverse = _fitted_temperature(logs[fitted], targets[fitted])
            values.append(float(torch.nn.functional.cross_entropy(logs[scored] * inverse, targets[scored])))
    return sum(values) / len(values)


def scores_of(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """All scores of a row; error, ECE and Brier score as fractions."""
    return {
        "error": float((probabilities.argmax(1) != targets).double().mean()),
        "nll": float(categorical_nll(probabilities, targets)),
        "calibrated_nll": calibrated_nll(probabilities, targets),
        "brier": float(brier_score(probabilities, targets)),
        "ece": float(calibration_error(probabilities, targets, num_bins=15)),
        "ece_paper": float(calibration_error(probabilities, targets, num_bins=10, variant="paper")),
    }
