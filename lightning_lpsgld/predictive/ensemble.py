"""The running posterior predictive: one sum of probabilities per test point, whatever the number of samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_lpsgld.metrics import disagreement_terms, entropy
from lightning_lpsgld.metrics.simplex import refuse_logits, refuse_probabilities
from lightning_lpsgld.predictive.running import RunningPredictive

__all__ = ["PosteriorPredictive", "probabilities_of"]


def probabilities_of(logits: Tensor) -> Tensor:
    """Softmax over the last dim in float32 (in float64 for float64 logits), whatever the dtype of ``logits``.

    Infinite logits are limits: classes at minus infinity have probability 0, those at plus infinity share 1.

    Args:
        logits: Shape ``(n, classes)``.

    Returns:
        That shape; rows sum to 1.

    Raises:
        ValueError: If the shape is not ``(n, classes)`` with at least two classes, or if the rows (four at least) are
            probabilities already.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"Logits must have shape (n, classes) with classes >= 2, got {tuple(logits.shape)}. Flatten further dims; "
            "for one logit z of a binary task pass torch.stack([0 * z, z], dim=1)."
        )
    refuse_probabilities(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = logits.softmax(dim=1)
    if bool(probabilities.isnan().any()):  # inf - inf, or a logit that is NaN and stays it
        top = logits == torch.inf
        certain = top.any(1, keepdim=True) & ~logits.isnan().any(1, keepdim=True)
        probabilities = torch.where(certain, top.to(logits.dtype) / top.sum(1, keepdim=True), probabilities)
    return probabilities


class PosteriorPredictive(RunningPredictive):
    r"""Posterior predictive of a growing set of samples.

    .. math::
        \bar p(y \mid x) = \frac1K \sum_{s=1}^K p(y \mid x, \theta_s)

    Kept per test point: the sum of probabilities and the sum of entropies, in float64 by default, how many samples
    predict each class (2 bytes), and the target; never what single samples predicted. Batches are numbered, and every
    sample has to see the same ones: a change of size or of targets (a loader that shuffles) is refused.

    Args:
        dtype: dtype of the sums; float32 halves the memory and adds a relative error of up to K * 6e-8.
        device: Where sums are kept; that of the probabilities by default.

    Raises:
        ValueError: If ``dtype`` is another one.

    Example:
        >>> import torch
        >>> predictive = PosteriorPredictive()
        >>> for logits in (torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])):
        ...     predictive.update(0, probabilities_of(logits), torch.tensor([1]))
        ...     predictive.end_sample()
        >>> predictive.probabilities
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
        >>> predictive.mutual_information
        tensor([0.6931], dtype=torch.float64)
    """

    def __init__(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}.")
        super().__init__()
        self.dtype, self.device = dtype, device
        self._sums: list[Tensor] = []
        self._entropies: list[Tensor] = []
        self._votes: list[Tensor] = []

    def update(self, index: int, probabilities: Tensor, targets: Tensor | None = None) -> None:
        """Add what the current sample predicts for batch number ``index``.

        Args:
            index: 0, 1, 2, ... in order; the same batches for every sample.
            probabilities: Shape ``(n, classes)``, not logits; see :func:`probabilities_of`.
            targets: Shape ``(n,)`` (or ``(n, classes)`` if soft), or ``None``.

        Raises:
            ValueError: If batches come in another order, or differ from those of the first sample; if they hold logits.
        """
        device = probabilities.device if self.device is None else self.device
        self._append(index, probabilities.detach().to(device), None if targets is None else targets.detach().to(device))

    def _start(self, index: int, prediction: Tensor, targets: Tensor | None) -> None:
        refuse_logits(prediction)
        self._sums.append(torch.zeros_like(prediction, dtype=self.dtype))
        self._entropies.append(torch.zeros(len(prediction), dtype=self.dtype, device=prediction.device))
        self._votes.append(torch.zeros_like(prediction, dtype=torch.int16))
        self._add(index, prediction, targets)

    def _add(self, index: int, prediction: Tensor, targets: Tensor | None) -> None:
        self._sums[index] += prediction
        self._entropies[index] += entropy(prediction).to(self.dtype)
        if self.num_samples == torch.iinfo(torch.int16).max:
            self._votes[index] = self._votes[index].int()
        chosen = prediction.argmax(1, keepdim=True)
        self._votes[index].scatter_add_(1, chosen, torch.ones_like(chosen, dtype=self._votes[index].dtype))

    def _fits(self, index: int, prediction: Tensor) -> bool:
        return self._sums[index].shape == prediction.shape

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Mean probabilities, shape ``(n, classes)``, and targets of each batch."""
        for total, targets in zip(self._sums, self._targets):
            yield total / self.num_samples, targets

    def __len__(self) -> int:
        return sum(len(total) for total in self._sums)

    @property
    def probabilities(self) -> Tensor:
        """Mean probabilities of all test points, shape ``(points, classes)``."""
        return torch.cat(self._sums) / self.num_samples

    @property
    def predictive_entropy(self) -> Tensor:
        r"""Total uncertainty :math:`H[\bar p]` of each point, in nats."""
        return entropy(self.probabilities)

    @property
    def expected_entropy(self) -> Tensor:
        r"""Aleatoric part :math:`\frac1K\sum_s H[p_s]` of each point, in nats."""
        return torch.cat(self._entropies) / self.num_samples

    @property
    def mutual_information(self) -> Tensor:
        r"""Epistemic part of each point, :math:`H[\bar p] - \frac1K\sum_s H[p_s]`, in nats; not below 0.

        Reference:
            Houlsby et al., 2011 (BALD), arXiv:1112.5745, equation 2.
        """
        return (self.predictive_entropy - self.expected_entropy).clamp(min=0.0)

    @property
    def disagreement(self) -> Tensor:
        """Share of pairs of samples that predict different classes for each point; 0 for a single sample."""
        return disagreement_terms(torch.cat(self._votes))
