"""Coupled: a compiled submodule is cast as an uncompiled one, and said to break its graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lpsgld.casting import ActivationCasting


def test_a_compiled_submodule_is_cast_and_named_in_a_warning():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    outer = nn.Module()
    outer.net = torch.compile(copy.deepcopy(plain), backend="eager")
    x = torch.randn(5, 4)
    first = ActivationCasting(plain, seed=7).attach()
    second = ActivationCasting(outer, seed=7)
    with pytest.warns(UserWarning, match="'net': it is compiled"):
        second.attach()
    for _ in range(3):
        with first.forward_context():
            expected = plain(x)
        with second.forward_context():
            got = outer.net(x)
        assert torch.equal(got, expected)
    second.remove()
    first.remove()
