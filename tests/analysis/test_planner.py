"""Invariant: a plan leaves the module alone, counts real bytes and says what its numbers say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lpsgld.analysis import fraction_length_for, plan, variance_budget
from lightning_lpsgld.formats import FixedPoint, with_word_length
from lightning_lpsgld.ops import encode, quantize
from lightning_lpsgld.random import DrawKey, normals


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 3)
    )


def batch():
    return normals((16, 1, 8, 8), DrawKey(91)).float(), torch.arange(16) % 3


def loss(module, data):
    return nn.functional.cross_entropy(module(data[0]), data[1])


@pytest.fixture(autouse=True)
def rng():
    with torch.random.fork_rng():
        yield


def test_module_gradients_buffers_and_generator_are_left_alone():
    net = small_net()
    before, state = copy.deepcopy(net.state_dict()), torch.random.get_rng_state()
    plan(net, batch(), loss, lr=0.1, num_data=1000)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert net.training


@pytest.mark.parametrize("fmt", ["bfp8", "fixed8.6", "bfp8-tensor", "mxint8"])
def test_bytes_are_those_of_the_encoded_weights(fmt):
    net = small_net()
    out = plan(net, batch(), loss, lr=0.1, num_data=1000, weights=fmt, update="full", samples=7)
    exact = sum(encode(p.detach(), fmt).nbytes for p in net.parameters())
    assert out.weight_bytes == exact
    assert out.sample_bytes == 7 * exact
    assert out.accumulator_bytes == sum(4 * p.numel() for p in net.parameters())


def test_budgets_are_those_of_the_planned_steps():
    net, rates = small_net(), [0.5, 0.1, 0.02]
    out = plan(net, batch(), loss, lr=rates, num_data=1000, temperature=1e-3, weights="fixed8.6")
    weight = dict(net.named_parameters())["5.bias"].detach()
    layer = next(layer for layer in out.layers if layer.name == "5.bias")
    torch.manual_seed(1)
    assert len(layer.budgets) == 3
    for lr, budget in zip(rates, layer.budgets):
        assert float(budget.target) == pytest.approx(2 * lr * 1e-3 / 1000, rel=1e-9)
    still = variance_budget(quantize(weight, "fixed8.6", rounding="nearest"), 1e-12, "fixed8.6")
    assert float(still.ratio) == 1.0  # without drift every variance is within reach


def test_verdicts_follow_the_numbers():
    net, data = small_net(), batch()
    cold = plan(net, data, loss, lr=0.1, num_data=50_000, temperature=1e-3, weights="fixed8.6")
    full = plan(net, data, loss, lr=0.1, num_data=50_000, temperature=1e-3, weights="fixed8.6", update="full")
    warm = plan(net, data, loss, lr=0.1, num_data=50, temperature=100.0, weights="fixed8.6")
    assert cold.effective_temperature > 2e-3
    assert 'accumulator="full"' in cold.verdict
    assert "too much noise" in str(cold)
    for fine, temperature in ((full, 1e-3), (warm, 100.0)):
        assert fine.effective_temperature == pytest.approx(temperature, rel=1e-9)
        assert all(layer.verdict == "ok" for layer in fine.layers)
    assert str(full).splitlines()[0].startswith("parameter")


def test_remedy_is_enough_and_one_bit_less_is_not():
    net, data = small_net(), batch()
    asked = {"lr": 0.1, "num_data": 1000, "temperature": 1e-3}
    layers = plan(net, data, loss, weights="bfp8", **asked).layers
    hot = next(layer for layer in layers if layer.remedy_bits not in (None, 8))
    tempered = {}
    for bits in (hot.remedy_bits, hot.remedy_bits - 1):
        torch.manual_seed(0)
        again = plan(net, data, loss, weights=f"bfp{bits}", **asked)
        tempered[bits] = next(layer for layer in again.layers if layer.name == hot.name)
    # The dropout mask of each plan is another one: compare with a margin on the lower side only.
    assert tempered[hot.remedy_bits].effective_temperature < tempered[hot.remedy_bits - 1].effective_temperature


@pytest.mark.parametrize("weights", ["bfp8", "fixed8.6", "e4m3"])
@pytest.mark.parametrize("update", ["vc", "naive"])
def test_the_least_accumulator_carries_the_temperature_and_one_bit_less_does_not(weights, update):
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = torch.randn(16, 6), torch.randint(0, 3, (16,))
    asked = {"lr": [0.1, 0.01], "num_data": 1000, "temperature": 1e-3, "weights": weights, "update": update}
    least = plan(net, data, loss, **asked).least_accumulator
    assert least is not None
    assert f'accumulator="{least}"' in plan(net, data, loss, **asked).verdict
    carried = plan(net, data, loss, accumulator=least, **asked)
    worst = [max(float(b.ratio) for b in layer.budgets) for layer in carried.layers]
    assert max(worst) <= 1.1
    assert carried.least_accumulator == least
    assert f"sums {least}" in carried.verdict
    narrower = plan(net, data, loss, accumulator=with_word_length(least, least.bits - 1), **asked)
    assert max(float(b.ratio) for layer in narrower.layers for b in layer.budgets) > 1.1
    assert narrower.least_accumulator == least


def test_bytes_of_an_accumulator_are_those_of_its_codes():
    net = small_net()
    for fmt in ("bfp16", "mxint16", "fixed12.10"):
        out = plan(net, batch(), loss, lr=0.1, num_data=1000, weights="bfp8", accumulator=fmt)
        assert out.accumulator_bytes == sum(encode(p.detach(), fmt).nbytes for p in net.parameters())
    assert plan(net, batch(), loss, lr=0.1, num_data=1000, accumulator="full").update == "full"


def test_clipped_layers_are_told_their_fraction_length():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(3.0)
    out = plan(net, (torch.ones(4, 2), torch.zeros(4).long()), loss, lr=0.1, num_data=10, weights="fixed8.6")
    layer = out.layers[0]
    assert layer.clipped == 1.0
    assert layer.fraction_length == 5
    assert "use F = 5" in layer.verdict


@pytest.mark.parametrize("word_length", [4, 8, 16])
def test_fraction_length_is_the_finest_that_clips_nothing(word_length):
    for top in (1e-6, 0.3, 0.99, 1.0, 127 / 128, 3.0, 1e4):
        fraction = fraction_length_for(torch.tensor([top, -top / 3]), word_length)
        assert FixedPoint(word_length, fraction).max >= top * (1 - 1e-7)
        assert FixedPoint(word_length, fraction + 1).max < top


def test_frozen_and_unused_parameters():
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(3, 3), "frozen": nn.Linear(2, 2)})
    net["frozen"].requires_grad_(False)
    data = torch.ones(4, 2), torch.zeros(4).long()
    out = plan(net, data, lambda m, b: nn.functional.cross_entropy(m["used"](b[0]), b[1]), lr=0.1, num_data=10)
    assert [layer.name for layer in out.layers] == ["used.weight", "used.bias", "unused.weight", "unused.bias"]


def test_refusals():
    net = nn.Linear(2, 2)
    for change, name in (({"lr": []}, "lr"), ({"lr": -1.0}, "lr"), ({"num_data": 0}, "num_data")):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            plan(net, None, loss, **{"lr": 0.1, "num_data": 10, **change})
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        plan(nn.Linear(2, 2).requires_grad_(False), None, loss, lr=0.1, num_data=10)


def test_what_a_clamp_holds_is_in_the_verdict_and_what_carries_is_in_the_noise():
    """Scales just below 1, each a block, that the step would take over."""
    net = torch.nn.BatchNorm1d(6, affine=True)
    torch.nn.init.constant_(net.weight, 0.9921875)
    data = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(32, 6)
    options = {"lr": 0.001, "num_data": 10**6}
    loss = lambda module, batch: -module(batch[0]).square().mean()  # noqa: E731  # pushes scales up
    clamp, carry = (plan(net, data, loss, weights=fmt, **options) for fmt in ("bfp8-clamp", "bfp8"))
    assert "100.0% of the blocks held below a power of two by clamping" in clamp.layers[0].verdict
    assert "held" not in carry.layers[0].verdict
    held, carried = clamp.layers[0].budgets[0], carry.layers[0].budgets[0]
    assert (float(held.held), float(carried.held)) == (1.0, 0.0)
    assert float(held.bias) > 0.0 == float(carried.bias)
    assert 0.0 == float(held.crossing) < float(carried.crossing) < 0.1
