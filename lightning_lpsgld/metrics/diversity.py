"""How much the members of an ensemble differ, and what averaging them gains."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.metrics.base import MeanScore
from lightning_lpsgld.metrics.functional import nll_terms

__all__ = ["Ambiguity", "Disagreement", "ambiguity_terms", "disagreement_terms", "votes_of"]


def votes_of(member_probabilities: Tensor) -> Tensor:
    """Number of members that predict each class; int64, from shape ``(samples, n, classes)`` to ``(n, classes)``.

    Args:
        member_probabilities: Shape ``(samples, n, classes)``.

    Returns:
        int64 of shape ``(n, classes)``.
    """
    predicted = member_probabilities.argmax(-1)
    return torch.nn.functional.one_hot(predicted, member_probabilities.shape[-1]).sum(0)


def disagreement_terms(votes: Tensor) -> Tensor:
    r"""Share of pairs of members that predict different classes, :math:`1 - \sum_c v_c(v_c-1) / (K(K-1))`.

    Args:
        votes: Number of members for each class, shape ``(n, classes)``; rows sum to K.

    Returns:
        float64 of shape ``(n,)``; 0 for a single member.
    """
    counts = votes.double()
    members = counts.sum(1)
    agreeing = (counts * (counts - 1)).sum(1)
    return torch.where(members > 1, 1.0 - agreeing / (members * (members - 1)).clamp(min=1.0), 0.0)


def ambiguity_terms(member_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean NLL of the members minus NLL of their mean, per point: what averaging gains, in nats; float64 ``(n,)``.

    Args:
        member_probabilities: Shape ``(samples, n, classes)``.
        targets: Classes, int64, shape ``(n,)``.

    Returns:
        float64 of shape ``(n,)``.
    """
    single = torch.stack([nll_terms(member, targets) for member in member_probabilities]).mean(0)
    return single - nll_terms(member_probabilities.double().mean(0), targets)


class Disagreement(MeanScore):
    """Mean share of pairs of members that predict different classes; see :func:`disagreement_terms`.

    Example:
        >>> import torch
        >>> metric = Disagreement()
        >>> metric.update(torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]], [[0.6, 0.4]]]))
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    def update(self, member_probabilities: Tensor) -> None:
        """Add predictions of all members, shape ``(samples, n, classes)``."""
        self.add(disagreement_terms(votes_of(member_probabilities)))


class Ambiguity(MeanScore):
    """Mean loss of the members minus loss of the ensemble, in nats; see :func:`ambiguity_terms`.

    Example:
        >>> import torch
        >>> metric = Ambiguity()
        >>> metric.update(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.5108, dtype=torch.float64)

    Reference:
        Krogh & Vedelsby, 1994, "Neural network ensembles, cross validation, and active learning".
    """

    higher_is_better = True

    def update(self, member_probabilities: Tensor, targets: Tensor) -> None:
        """Add predictions of all members, shape ``(samples, n, classes)``, and targets."""
        self.add(ambiguity_terms(member_probabilities, targets))
