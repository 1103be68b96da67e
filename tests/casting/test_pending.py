"""Casts that wait in evaluation: the bits of casts that do not, whatever the network does with what waits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.small_resnet import SmallResNet
from torch import Tensor, nn

from lightning_lpsgld.arithmetic import capability, layers
from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.casting.cast import Caster
from lightning_lpsgld.casting.pending import Pending
from lightning_lpsgld.ops import cpu, evaluation, quantize
from lightning_lpsgld.predictive import layer_arithmetic

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no kernels here")


class Network(nn.Module):
    """A convolution, then what ``between`` makes of it with the norm's help, then a convolution."""

    def __init__(self, between, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.second = nn.ReLU(inplace), nn.Conv2d(4, 4, 3, padding=1)
        self.between, self.last = between, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor):
        x = self.between(self, self.first(x))
        return self.last(F.relu(self.second(x)))


def held_and_overwritten(net, x):
    before = net.norm(x)
    after = net.relu(before)
    return after + before


def added_in_place(net, x):
    y = net.norm(x)
    y += x
    return net.relu(y)


def overwritten_after(net, x):
    y = net.norm(x)
    z = net.relu(y)
    y.mul_(2)
    x.add_(1)
    return z + x + y


def through_a_view(net, x):
    y = net.relu(net.norm(x))
    y[:, :2].mul_(0.5)
    return y


def by_functions(net, x):
    norm = net.norm
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()


BETWEEN = {
    "norm and activation": lambda net, x: net.relu(net.norm(x)),
    "activation": lambda net, x: net.relu(x),
    "nothing": lambda net, x: x,
    "norm": lambda net, x: net.norm(x),
    "activation, then norm": lambda net, x: net.norm(net.relu(x)),
    "two norms": lambda net, x: net.relu(net.norm(net.norm(x))),
    "a shortcut": lambda net, x: net.relu(net.norm(x) + x),
    "both used": held_and_overwritten,
    "in place": added_in_place,
    "overwritten": overwritten_after,
    "a view changed": through_a_view,
    "functions": by_functions,
    "another activation": lambda net, x: F.gelu(net.norm(x)),
    "a pool": lambda net, x: F.max_pool2d(net.relu(net.norm(x)), 3, 1, 1),
    "in-place function": lambda net, x: F.relu_(net.norm(x)),
    "in-place function, argument kept": lambda net, x: (lambda y: F.relu(y, inplace=True) + y)(net.norm(x)),
}


@pytest.fixture(autouse=True)
def _everything_pays(monkeypatch):
    monkeypatch.setattr(layers, "_WORTHWHILE", 0)


def prepared(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.normal_(module.weight)
        for p in net.parameters():
            p.copy_(quantize(p, "bfp8", rounding="nearest"))
    return net.eval()


def outputs(net: nn.Module, x: Tensor, context=torch.no_grad, **options) -> list:
    casting = ActivationCasting(net, seed=0, **options).attach()
    with context(), layer_arithmetic(net, "auto"), casting.forward_context():
        found = [net(x) for _ in range(4)]  # the first finds the output; codes are offered twice
    casting.remove()
    return found


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("between", BETWEEN)
def test_the_bits_are_those_of_casts_that_do_not_wait(between, inplace, context, monkeypatch):
    net, x = prepared(Network(BETWEEN[between], inplace)), torch.randn(2, 3, 6, 6)
    found = outputs(net, x, context)
    monkeypatch.setattr(Caster, "_waits", lambda self: False)
    expected = outputs(net, x, context)
    assert all(type(out) is Tensor for out in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_residual_network_is_made_in_single_passes(monkeypatch):
    """No batch norm runs by itself, and what goes into a layer becomes codes without floats in between."""
    calls = {"one pass": 0, "composed": 0}
    fused, composed = evaluation._fused, evaluation.composed

    def count_fused(*args, **kwargs):
        calls["one pass"] += 1
        return fused(*args, **kwargs)

    def count_composed(*args):
        calls["composed"] += 1
        return composed(*args)

    monkeypatch.setattr(evaluation, "_fused", count_fused)
    monkeypatch.setattr(evaluation, "composed", count_composed)
    net, x = prepared(SmallResNet(8)), torch.randn(2, 3, 32, 32)
    found = outputs(net, x)
    assert calls["composed"] == 0
    convolutions = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert calls["one pass"] >= 3 * convolutions  # of three forwards: each convolution's result, and each sum's ReLU
    monkeypatch.setattr(Caster, "_waits", lambda self: False)
    assert all(torch.equal(a, b) for a, b in zip(found, outputs(net, x), strict=True))


class Heads(nn.Module):
    """Several outputs, some of which would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor):
        features = self.norm(self.conv(x))
        return {"features": features, "logits": self.out(F.relu(features)), "both": [F.relu(features)]}


def test_what_is_returned_does_not_wait(monkeypatch):
    net, x = prepared(Heads()), torch.randn(2, 3, 6, 6)
    found = outputs(net, x)
    monkeypatch.setattr(Caster, "_waits", lambda self: False)
    for a, b in zip(found, outputs(net, x), strict=True):
        for got, expected in zip((a["features"], a["logits"], *a["both"]), (b["features"], b["logits"], *b["both"])):
            assert type(got) is Tensor
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({"eval_rounding": "stochastic"}, torch.no_grad),
        ({"activations": "e4m3"}, torch.no_grad),
        ({"activations": "bfp8-tensor"}, torch.no_grad),
        ({}, torch.enable_grad),
    ],
    ids=["draws", "floats", "one exponent for all", "gradients"],
)
def test_nothing_waits_where_it_cannot(options, context, monkeypatch):
    made = []
    new = Pending.__new__
    monkeypatch.setattr(Pending, "__new__", lambda *args, **kwargs: made.append(0) or new(*args, **kwargs))
    outputs(prepared(Network(BETWEEN["norm and activation"])), torch.randn(2, 3, 6, 6), context, **options)
    assert not made
    outputs(prepared(Network(BETWEEN["norm and activation"])), torch.randn(2, 3, 6, 6))
    assert made or not capability().onednn


def test_numbers_that_are_not_finite_go_through(monkeypatch):
    net, x = prepared(Network(BETWEEN["norm and activation"])), torch.randn(2, 3, 6, 6)
    x[1, 0, 3, 3] = torch.nan
    found = outputs(net, x)
    assert found[0].isnan().any()
    monkeypatch.setattr(Caster, "_waits", lambda self: False)
    for a, b in zip(found, outputs(net, x), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def test_it_prints_and_turns_into_numbers_as_any_tensor():
    chain = evaluation.Chain(torch.tensor([[1.0, -2.0]]), relu=True)
    assert repr(Pending(chain)) == "tensor([[1., 0.]])"
    assert Pending(chain).tolist() == [[1.0, 0.0]]
    assert Pending(chain).numpy().tolist() == [[1.0, 0.0]]
    assert float(Pending(chain).sum()) == 1.0
    for twin in (copy.deepcopy(Pending(chain)), pickle.loads(pickle.dumps(Pending(chain)))):
        assert type(twin) is Tensor
        assert twin.tolist() == [[1.0, 0.0]]


@pytest.mark.filterwarnings("ignore")
def test_nothing_waits_beside_a_part_that_cannot_be_looked_into(monkeypatch):
    """A compiled or scripted submodule may overwrite what it is given unseen, and takes no tensors of another class."""
    net, x = prepared(Network(BETWEEN["norm and activation"])), torch.randn(2, 3, 6, 6)
    net.relu = torch.jit.script(net.relu)
    monkeypatch.setattr(Pending, "__new__", lambda *args, **kwargs: pytest.fail("something waits"))
    outputs(net, x)


@pytest.mark.parametrize("between", ["a view changed", "in place", "overwritten"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_codes_of_what_was_overwritten_are_not_taken(between, context):
    """Tensors of inference mode do not count their versions."""
    net, x = prepared(Network(BETWEEN[between])), torch.randn(2, 3, 6, 6)
    casting = ActivationCasting(net, seed=0).attach()
    with context(), casting.forward_context():
        simulated = net(x)
    casting.remove()
    assert all(torch.allclose(out, simulated, atol=1e-6) for out in outputs(net, x, context))
