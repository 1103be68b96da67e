r"""Scores of predicted class probabilities that torchmetrics lacks, as functions on tensors.

Everywhere ``probabilities`` has shape ``(n, classes)`` with rows that sum to one, ``targets`` is an integer tensor of
shape ``(n,)`` or a floating one of shape ``(n, classes)``: a distribution over the classes, as mixup and label
smoothing give it. Sums are taken in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_lpsgld.metrics.simplex import refuse_logits

__all__ = [
    "BinVariant",
    "ReliabilityBins",
    "accuracy_terms",
    "bin_sums",
    "brier_score",
    "brier_terms",
    "calibration_error",
    "categorical_nll",
    "entropy",
    "nll_terms",
    "reliability_bins",
]

#: ``"standard"``: M equal bins; ``"paper"``: the nine bins of the published code, with its treatment of the ends.
BinVariant = Literal["standard", "paper"]
PAPER_BINS = 9


def check_predictions(probabilities: Tensor, targets: Tensor, *, rows: bool = True) -> None:
    """Raise unless shapes, dtypes and values are as this module says; to look at values waits for an accelerator.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Shape ``(n,)``, or ``(n, classes)`` if soft.
        rows: Whether rows must sum to 1; for scores of the largest probability alone they need not.

    Raises:
        ValueError: If a shape is wrong, or rows are no probabilities (logits, say).
        TypeError: If a dtype is wrong.
    """
    soft = targets.shape == probabilities.shape
    if probabilities.ndim != 2 or not (soft or targets.shape == probabilities.shape[:1]):
        raise ValueError(
            f"`probabilities` must have shape (n, classes) and `targets` (n,), got {tuple(probabilities.shape)} and "
            f"{tuple(targets.shape)}. Flatten further dims into the first."
        )
    if not probabilities.is_floating_point() or targets.is_floating_point() != soft or targets.dtype == torch.bool:
        raise TypeError(
            f"`probabilities` must be floating and `targets` integer, got {probabilities.dtype} and {targets.dtype}."
        )
    refuse_logits(probabilities if rows else probabilities.max(1).values)


def hits(predicted: Tensor, targets: Tensor) -> Tensor:
    """1 where the predicted class is the target, else 0; of a soft target, that class's probability; float64."""
    if targets.ndim == 2:
        return targets.gather(1, predicted.unsqueeze(1)).squeeze(1).double()
    return (predicted == targets).double()


def accuracy_terms(probabilities: Tensor, targets: Tensor) -> Tensor:
    """1 where the (first) most probable class is the target, else 0; of a soft target its (first) largest class counts.

    Returns:
        float64, shape ``(n,)``.
    """
    check_predictions(probabilities, targets)
    return (probabilities.argmax(1) == (targets.argmax(1) if targets.ndim == 2 else targets)).double()


def nll_terms(probabilities: Tensor, targets: Tensor) -> Tensor:
    r"""Negative log probability of each target, :math:`-\ln\max(p_{i,y_i}, 2^{-126})`; of a soft one its mean.

    The clamp (at the smallest normal float32) bounds a term by 87.4, so that one confident error of a rounded ensemble
    does not make a mean infinite.

    Returns:
        float64, shape ``(n,)``, in nats.
    """
    check_predictions(probabilities, targets)
    if targets.ndim == 2:
        return -(targets.double() * probabilities.double().clamp(min=2.0**-126).log()).sum(1)
    chosen = probabilities.gather(1, targets.long().unsqueeze(1)).squeeze(1)
    return -chosen.double().clamp(min=2.0**-126).log()


def categorical_nll(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log likelihood of the targets, in nats; see :func:`nll_terms` for the clamp.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Classes, int64, shape ``(n,)``.

    Returns:
        float64 scalar; NaN for no predictions.

    Example:
        >>> import torch
        >>> categorical_nll(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
        tensor(0.4904, dtype=torch.float64)
    """
    return nll_terms(probabilities, targets).mean()


def brier_terms(probabilities: Tensor, targets: Tensor) -> Tensor:
    r"""Quadratic score of each prediction, :math:`\sum_k (p_{ik} - [y_i = k])^2`, in [0, 2].

    Returns:
        float64, shape ``(n,)``.
    """
    check_predictions(probabilities, targets)
    if targets.ndim == 2:
        return (probabilities.double() - targets.double()).square().sum(1)
    hot = torch.zeros_like(probabilities, dtype=torch.float64).scatter_(1, targets.long().unsqueeze(1), 1.0)
    return (probabilities.double() - hot).square().sum(1)


def brier_score(probabilities: Tensor, targets: Tensor) -> Tensor:
    r"""Mean Brier score, **summed over classes**: 0 is perfect, 2 the worst.

    Libraries that average over the classes report this divided by their number; for two classes the one-sided score
    :math:`(p_1 - y)^2` is half of this.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Classes, int64, shape ``(n,)``.

    Returns:
        float64 scalar; NaN for no predictions.

    Example:
        >>> import torch
        >>> brier_score(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
        tensor(0.3125, dtype=torch.float64)

    Reference:
        Brier, 1950, "Verification of forecasts expressed in terms of probability".
    """
    return brier_terms(probabilities, targets).mean()


def entropy(probabilities: Tensor, dim: int = -1) -> Tensor:
    r"""Shannon entropy :math:`-\sum_k p_k \ln p_k` in nats, with :math:`0 \ln 0 = 0`; float64.

    Args:
        probabilities: Any shape; they sum to 1 over ``dim``.
        dim: Dim of the classes.

    Returns:
        float64, in nats, without that dim.

    Example:
        >>> import torch
        >>> entropy(torch.tensor([0.5, 0.5, 0.0]))
        tensor(0.6931, dtype=torch.float64)
    """
    return torch.special.entr(probabilities.double()).sum(dim)


def check_bins(num_bins: int, variant: BinVariant) -> int:
    """Number of rows in the bin sums, after checking the arguments.

    Raises:
        ValueError: If ``variant`` is unknown or ``num_bins`` is not a positive int.
    """
    if variant == "paper":
        return PAPER_BINS + 1
    if variant != "standard":
        raise ValueError(f"`variant` must be 'standard' or 'paper', got {variant!r}.")
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"`num_bins` must be an int >= 1, got {num_bins!r}.")
    return num_bins


def bin_sums(
    probabilities: Tensor, targets: Tensor, num_bins: int = 15, variant: BinVariant = "standard"
) -> tuple[Tensor, Tensor]:
    r"""Sums that every calibration figure is made of; they add over batches and ranks.

    Bin k of M holds the confidences :math:`(k-1)/M < c \le k/M`, compared in float64, so 1.0 lies in the last one.
    ``"standard"`` puts :math:`c = 0` into the first bin and what lies above 1 (a sum of rounded probabilities) into
    the last. ``"paper"`` has M = 9 (its ten edges are ``linspace(0, 1, 10)``), a bin of its own for :math:`c = 0` and
    drops what lies above 1.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Shape ``(n,)``.
        num_bins: M; ignored by ``"paper"``.
        variant: Which bins.

    Returns:
        float64 of shape ``(M, 3)`` (``(10, 3)`` for ``"paper"``): count, sum of confidences, number of correct
        predictions, per bin; and the number of predictions, dropped ones included, as a float64 scalar. Confidence is
        the largest probability, the prediction its (first) class.
    """
    rows = check_bins(num_bins, variant)
    check_predictions(probabilities, targets, rows=False)
    confidence, predicted = probabilities.max(1)
    confidence, correct = confidence.double(), hits(predicted, targets)
    upper = torch.arange(0 if variant == "paper" else 1, (PAPER_BINS if variant == "paper" else rows) + 1)
    edges = (upper.double() / (PAPER_BINS if variant == "paper" else rows)).to(confidence.device)
    index = torch.bucketize(confidence, edges)  # edges[i-1] < c <= edges[i]; above the last edge: rows
    if variant == "standard":
        index = index.clamp(max=rows - 1)
    terms = torch.stack([torch.ones_like(confidence), confidence, correct], dim=1)
    sums = terms.new_zeros(rows + 1, 3).index_add_(0, index, terms)
    return sums[:rows], torch.tensor(float(len(targets)), dtype=torch.float64, device=sums.device)


def calibration_error_of_sums(sums: Tensor, total: Tensor) -> Tensor:
    """Expected calibration error of what :func:`bin_sums` returned (summed over batches); float64 scalar."""
    return (sums[:, 1] - sums[:, 2]).abs().sum() / total


def calibration_error(
    probabilities: Tensor, targets: Tensor, num_bins: int = 15, variant: BinVariant = "standard"
) -> Tensor:
    r"""Expected calibration error, :math:`\sum_k \frac{n_k}{n}\,|\mathrm{conf}_k - \mathrm{acc}_k|`.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Shape ``(n,)``.
        num_bins: Number of equal bins; ignored by ``"paper"``.
        variant: Which bins; see :func:`bin_sums`. The published tables used ``"paper"``.

    Returns:
        float64 scalar in [0, 1]; NaN for no predictions.

    Note:
        ``torchmetrics.functional.classification.multiclass_calibration_error`` puts a confidence of exactly 1.0 into a
        bin of its own beyond the last and closes bins on the left; where no confidence lies on an edge both agree.

    Example:
        >>> import torch
        >>> calibration_error(torch.tensor([[0.0, 1.0], [0.25, 0.75]]), torch.tensor([1, 0]))
        tensor(0.3750, dtype=torch.float64)

    Reference:
        Guo et al., 2017, arXiv:1706.04599, equation 3.
    """
    return calibration_error_of_sums(*bin_sums(probabilities, targets, num_bins, variant))


@dataclass(frozen=True)
class ReliabilityBins:
    """Data of a reliability diagram.

    Attributes:
        lower: Lower ends of the bins (excluded), float64, shape ``(bins,)``.
        upper: Upper ends (included).
        count: Predictions in each bin.
        confidence: Mean confidence in each bin; NaN where it is empty.
        accuracy: Share of correct predictions in each bin; NaN where it is empty.
    """

    lower: Tensor
    upper: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> Tensor:
        """Expected calibration error of these bins."""
        gap = (self.confidence - self.accuracy).abs().nan_to_num(0.0)
        return (gap * self.count).sum() / self.count.sum()


def reliability_of_sums(sums: Tensor) -> ReliabilityBins:
    """Diagram data of the standard bins that :func:`bin_sums` returned (summed over batches)."""
    upper = torch.arange(1, len(sums) + 1, dtype=torch.float64, device=sums.device) / len(sums)
    count = sums[:, 0]
    return ReliabilityBins(upper - 1.0 / len(sums), upper, count, sums[:, 1] / count, sums[:, 2] / count)


def reliability_bins(probabilities: Tensor, targets: Tensor, num_bins: int = 15) -> ReliabilityBins:
    """Confidence, accuracy and count per bin, for a reliability diagram; bins as in :func:`bin_sums`.

    Args:
        probabilities: Shape ``(n, classes)``.
        targets: Shape ``(n,)``.
        num_bins: Number of equal bins.

    Returns:
        One value per bin.

    Example:
        >>> import torch
        >>> reliability_bins(torch.tensor([[0.0, 1.0], [0.25, 0.75]]), torch.tensor([1, 0]), num_bins=2).accuracy
        tensor([   nan, 0.5000], dtype=torch.float64)
    """
    return reliability_of_sums(bin_sums(probabilities, targets, num_bins)[0])
