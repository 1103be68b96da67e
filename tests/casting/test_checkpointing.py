"""Coupled: a forward that is repeated in backward makes the draws it made the first time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lpsgld.casting import ActivationCasting


class _Stack(nn.Module):
    def __init__(self, checkpointed: bool, reentrant: bool = False, function: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed, self.reentrant, self.function = checkpointed, reentrant, function
        block = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU())  # noqa: E731
        self.blocks, self.head = nn.ModuleList([block() for _ in range(3)]), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, self.blocks[0]]:  # the first block runs twice
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.checkpointed else block(x)
            x = F.silu(x) if self.function else x
        return self.head(x)


def _gradients(net: nn.Module, saved: str) -> list[Tensor]:
    net = copy.deepcopy(net)
    casting = ActivationCasting(net, seed=5, saved_activations=saved).attach()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for _ in range(3):
        with casting.forward_context():
            loss = net(x).square().sum()
        loss.backward()
        found += [loss.detach(), *(p.grad for p in net.parameters())]
        net.zero_grad()
    assert casting.state_dict()["forwards"] == 3
    casting.remove()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("saved", ["full", "codes"])
def test_checkpointed_blocks_give_the_gradients_of_plain_ones(reentrant, saved):
    plain = _gradients(_Stack(False), saved)
    again = _gradients(_Stack(True, reentrant), saved)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_functions_with_checkpointing_are_refused():
    with pytest.raises(RuntimeError, match=r"run again in backward.*silu.*nn.ReLU"):
        _gradients(_Stack(True, function=True), "full")
