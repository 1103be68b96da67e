"""A score in one file, as a user could write it: a function, and its shell on the package's base class."""

from __future__ import annotations

from torch import Tensor

from lightning_lpsgld.metrics import MeanScore


def top_two(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Whether the target is among the two likeliest classes, per prediction."""
    return (probabilities.topk(2, dim=1).indices == targets[:, None]).any(1).double()


class TopTwo(MeanScore):
    """Share of the targets among the two likeliest classes."""

    higher_is_better = True

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        self.add(top_two(probabilities, targets))
