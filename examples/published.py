"""A classifier with the published learning-rate schedule, for the configurations of CIFAR and IMDB."""

from __future__ import annotations

from typing import Any

import torch
from comparison import Classifier
from torch import nn

__all__ = ["ScheduledClassifier", "paper_decay"]


def paper_decay(progress: float) -> float:
    """Factor on the learning rate at a share of the run: 1 to one half, then linear to 1 % at nine tenths."""
    return min(1.0, max(0.01, 1.0 - 0.99 * (progress - 0.5) / 0.4))


class ScheduledClassifier(Classifier):
    """A plain classifier whose learning rate falls as in Zhang, Wilson & De Sa (2022), once an epoch.

    Args:
        net: The network.
        lr: Learning rate at the start.
        weight_decay: L2 coefficient.
        decay: ``False``: a constant rate, for the plugin's ``cycles=...``.
    """

    def __init__(self, net: nn.Module, lr: float, weight_decay: float, decay: bool = True) -> None:
        super().__init__(net, lr, weight_decay)
        self.decay = decay

    def configure_optimizers(self) -> Any:
        """SGD without momentum; the plugin takes its learning rate, weight decay and schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if not self.decay:
            return optimizer
        epochs = self.trainer.max_epochs or 1
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: paper_decay(epoch / epochs))]
