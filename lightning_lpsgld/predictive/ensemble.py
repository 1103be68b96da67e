"""The running posterior predictive: one sum of probabilities per test point, whatever the number of samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_lpsgld.metrics import entropy

__all__ = ["PosteriorPredictive", "probabilities_of"]


def probabilities_of(logits: Tensor) -> Tensor:
    """Softmax over the last dim in float32 (in float64 for float64 logits), whatever the dtype of ``logits``.

    Raises:
        ValueError: If the shape is not ``(n, classes)`` with at least two classes.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"Logits must have shape (n, classes) with classes >= 2, got {tuple(logits.shape)}. Flatten further dims; "
            "for one logit z of a binary task pass torch.stack([0 * z, z], dim=1)."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)


class PosteriorPredictive:
    r"""Posterior predictive of a growing set of samples.

    .. math::
        \bar p(y \mid x) = \frac1K \sum_{s=1}^K p(y \mid x, \theta_s)

    Kept per test point: the sum of probabilities and the sum of entropies, in float64 by default, and the target; never
    what single samples predicted. Batches are numbered, and every sample has to see the same ones: a change of size or
    of targets (a loader that shuffles) is refused.

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
        self.dtype, self.device = dtype, device
        self.num_samples = 0
        self._sums: list[Tensor] = []
        self._entropies: list[Tensor] = []
        self._targets: list[Tensor | None] = []
        self._next = 0

    def update(self, index: int, probabilities: Tensor, targets: Tensor | None = None) -> None:
        """Add what the current sample predicts for batch number ``index``.

        Args:
            index: 0, 1, 2, ... in order; the same batches for every sample.
            probabilities: Shape ``(n, classes)``, not logits; see :func:`probabilities_of`.
            targets: Shape ``(n,)``, or ``None``.

        Raises:
            ValueError: If batches come in another order, or differ from those of the first sample.
        """
        if index != self._next:
            raise ValueError(f"Batch {self._next} of a sample must come next, got {index}.")
        device = probabilities.device if self.device is None else self.device
        terms = probabilities.detach().to(device=device, dtype=self.dtype)
        entropies = entropy(probabilities.detach()).to(device=device, dtype=self.dtype)
        targets = None if targets is None else targets.detach().to(device)
        if self.num_samples == 0:
            self._sums.append(terms.clone())
            self._entropies.append(entropies.clone())
            self._targets.append(None if targets is None else targets.clone())
        else:
            self._check_same(index, terms, targets)
            self._sums[index] += terms
            self._entropies[index] += entropies
        self._next = index + 1

    def _check_same(self, index: int, terms: Tensor, targets: Tensor | None) -> None:
        known = index < len(self._sums)
        if known and self._sums[index].shape == terms.shape:
            first = self._targets[index]
            if (first is None) == (targets is None) and (first is None or torch.equal(first, targets)):  # type: ignore[arg-type]
                return
        raise ValueError(
            f"Batch {index} is not the one that the first sample saw. Every sample needs the same batches in the same "
            "order: turn shuffling and random augmentation off."
        )

    def end_sample(self) -> None:
        """Close the current sample; the next update starts another.

        Raises:
            ValueError: If it saw no batch, or fewer than the first sample.
        """
        if self._next == 0 or self._next != len(self._sums):
            raise ValueError(
                f"A sample ended after {self._next} batches, the first saw {len(self._sums)}. Pass batches that can be "
                "iterated more than once (a DataLoader, a list), and not none."
            )
        self.num_samples += 1
        self._next = 0

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
    def targets(self) -> Tensor | None:
        """Targets of all test points, shape ``(points,)``; ``None`` if a batch had none."""
        known = [targets for targets in self._targets if targets is not None]
        return torch.cat(known) if len(known) == len(self._targets) else None

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
