"""Attention's projections: products of codes, exact, named, and the same attention around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lpsgld.arithmetic import ArithmeticRefusal, LayerArithmetic, capability, layers
from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.ops import code_parameters_, quantize
from lightning_lpsgld.predictive import layer_arithmetic


@pytest.fixture(autouse=True)
def _everything_pays(monkeypatch):
    monkeypatch.setattr(layers, "_WORTHWHILE", 0)


@pytest.fixture
def products(monkeypatch):
    """What ran in integers: input, weight, bias and result of each product."""
    seen: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []
    original = LayerArithmetic.product

    def product(self, call):
        out = original(self, call)
        if out is not None:
            seen.append((call.x.detach(), call.weight.detach(), call.bias, out.detach()))
        return out

    monkeypatch.setattr(LayerArithmetic, "product", product)
    return seen


def _on_grid(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(quantize(p, "bfp8", rounding="nearest"))
    return net


class Attending(nn.Module):
    """Attention over what a layer before it has made, of itself or of a memory."""

    def __init__(self, batch_first: bool, weights: bool, memory: str = "", **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other = nn.Linear(6, 8), nn.Linear(6, options.get("kdim", 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.weights, self.memory = weights, memory

    def forward(self, x: Tensor) -> Tensor:
        query = F.relu(self.first(x))
        memory = F.relu(self.other(x)) if self.memory else query
        values = memory * 1 if self.memory == "values" else memory
        return self.attention(query, memory, values, need_weights=self.weights)[0]


CASES = {
    "itself": ({"weights": True}, {"in_proj": "integer"}, 1),
    "itself, fused attention": ({"weights": False}, {"in_proj": "integer"}, 1),
    "a memory": ({"weights": False, "memory": "both"}, {"in_proj": "integer"}, 2),
    "keys and values of their own": (
        {"weights": True, "memory": "values"},
        {"in_proj": "its input is not a rounded activation (4 of its 6 products in integers)"},
        2,
    ),
    "widths of their own": (
        {"weights": False, "memory": "both", "kdim": 4, "vdim": 4},
        dict.fromkeys(("q_proj", "k_proj", "v_proj"), "integer"),
        3,
    ),
}


def _run(net: nn.Module, x: Tensor, arithmetic: str) -> tuple[Tensor, list[Tensor], Tensor, dict[str, str]]:
    """A training step and an evaluation, as the plugin runs them."""
    casting = ActivationCasting(net.train(), seed=3).attach()
    with layer_arithmetic(net, arithmetic) as running:
        with casting.forward_context():
            out = net(x)
        gradients = list(torch.autograd.grad(out.square().sum(), list(net.parameters()), allow_unused=True))
        with torch.no_grad(), casting.forward_context():
            evaluated = net.eval()(x)
        report = {} if running is None else running.report()
    casting.remove()
    return out.detach(), [g for g in gradients if g is not None], evaluated, report


@pytest.mark.skipif(not capability().onednn, reason="no integer kernels")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_projections_are_exact_products_of_codes(case, batch_first, products):
    options, expected, count = CASES[case]
    net, x = _on_grid(Attending(batch_first, **options)), torch.randn(3, 5, 6)
    out, gradients, evaluated, report = _run(net, x, "auto")
    found = {name[10:]: how for name, how in report.items() if name.startswith("attention.")}
    assert found == {**expected, "out_proj": "its input is not a rounded activation"}
    assert len(products) == 2 * count  # of the training step and of the evaluation
    _assert_exact(products)
    plain_out, plain_gradients, plain_evaluated, _ = _run(net, x, "simulated")
    pairs = [(out, plain_out), (evaluated, plain_evaluated), *zip(gradients, plain_gradients, strict=True)]
    for got, plain in pairs:
        assert (got - plain).abs().max() <= 1e-6 * plain.abs().max().clamp(min=1e-3)


def _assert_exact(products) -> None:
    for given, weight, bias, result in products:
        exact = (given.double() @ weight.double().t()).float()  # a few terms of 8 by 8 bits: exact in float64
        assert torch.equal(result, exact if bias is None else exact + bias)


SITES = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention, "*.out_proj")


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.first(x)))


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_runs_in_integers_where_all_inputs_are_rounded(norm_first, products):
    """Evaluation included, in which torch would take one kernel for all of the layer."""
    net, x = _on_grid(Encoder(norm_first)).eval(), torch.randn(3, 5, 6)
    casting = ActivationCasting(net, seed=3, sites=SITES).attach()
    outputs, reports = {}, {}
    for arithmetic in ("auto", "simulated"):
        with torch.no_grad(), layer_arithmetic(net, arithmetic) as running, casting.forward_context():
            net(x)
            outputs[arithmetic] = net(x)
        reports[arithmetic] = {} if running is None else running.report()
    assert (outputs["auto"] - outputs["simulated"]).abs().max() <= 1e-6
    _assert_exact(products)
    report = reports["auto"]
    named = {"encoder.self_attn.in_proj", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2"}
    assert named < report.keys()
    assert report["first"] == "its input is the network's, which is not rounded"
    if capability().vnni:  # without, inputs with signs are simulated
        assert all(report[name] == "integer" for name in named)
    with torch.no_grad(), layer_arithmetic(net, "integer") as running, casting.forward_context():
        if norm_first:  # the last layer's input is a sum
            with pytest.raises(
                ArithmeticRefusal, match="layer 'last' cannot run in integers: its input is not a round"
            ):
                net(x)
        else:
            net(x)
    assert {name: running.report()[name] for name in named} == dict.fromkeys(named, "integer")
    _assert_exact(products)


def test_a_projection_that_cannot_is_named():
    net, x = _on_grid(Encoder()).eval(), torch.randn(3, 5, 6)
    casting = ActivationCasting(net, seed=3).attach()
    with (
        pytest.raises(ArithmeticRefusal, match=r"layer 'encoder.self_attn.out_proj' cannot run in integers: its input"),
        torch.no_grad(),
        layer_arithmetic(net, "integer"),
        casting.forward_context(),
    ):
        net(x)
    casting.remove()
    with torch.no_grad():
        net.encoder.self_attn.in_proj_weight.normal_()
    casting = ActivationCasting(net, seed=3).attach()
    with (
        pytest.raises(ArithmeticRefusal, match=r"layer 'encoder.self_attn.in_proj' .* does not lie on a grid"),
        torch.no_grad(),
        layer_arithmetic(net, "integer"),
        casting.forward_context(),
    ):
        net(x)


def test_the_cast_before_the_output_projection_is_that_of_its_tokens():
    """One exponent per token, draws of its own in training, and its error comes back rounded."""
    net, x = _on_grid(Attending(True, weights=True)), torch.randn(2, 3, 6)
    given: list[Tensor] = []
    casting = ActivationCasting(net, seed=3, sites=(nn.Linear, nn.MultiheadAttention, "attention.out_proj")).attach()
    original = F.linear

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is original and args[1] is net.attention.out_proj.weight:
                given.append(args[0])
                args[0].retain_grad()
            return func(*args, **(kwargs or {}))

    with Watch(), casting.forward_context():
        out = net(x)
    out.square().sum().backward()
    (heads,) = given
    assert heads.shape == (6, 8)
    assert torch.equal(heads, quantize(heads, "bfp8", rounding="nearest"))
    assert {
        "name": "attention.out_proj",
        "type": "function",
        "activation": "bfp8",
        "error": "bfp8",
    } in casting.describe()
    casting.remove()
    plain = ActivationCasting(net, seed=3, sites=(nn.Linear, nn.MultiheadAttention)).attach()
    with plain.forward_context():
        assert not torch.equal(net(x), out)
    assert all(row["name"] != "attention.out_proj" for row in plain.describe())


def test_projections_of_coded_weights():
    """As with ``storage="codes"``: the weights, and the slices that attention takes of them, are decoded exactly."""
    x = torch.randn(3, 5, 6)
    for memory in ("", "both"):
        net = _on_grid(Attending(True, weights=False, memory=memory))
        out, _, _, _ = _run(net, x, "auto")
        code_parameters_(net, "bfp8")
        coded, _, _, _ = _run(net, x, "auto")
        assert torch.equal(out, coded)


def test_where_attention_cannot_be_opened_it_is_simulated(monkeypatch):
    """As with a version of torch whose function is compiled."""
    net, x = _on_grid(Attending(True, weights=True)).eval(), torch.randn(3, 5, 6)
    outputs = {}
    for arithmetic in ("simulated", "auto"):
        monkeypatch.setattr(layers, "opened_attention", lambda: None)
        casting = ActivationCasting(net, seed=3).attach()
        with torch.no_grad(), layer_arithmetic(net, arithmetic) as running, casting.forward_context():
            outputs[arithmetic] = net(x)
        casting.remove()
    assert torch.equal(outputs["auto"], outputs["simulated"])
    assert "attention.in_proj" not in running.report()
    monkeypatch.setattr("lightning_lpsgld.casting.heads.opened_attention", lambda: None)
    casting = ActivationCasting(net, seed=3, sites=(nn.Linear, nn.MultiheadAttention, "attention.out_proj")).attach()
    refused = pytest.raises(RuntimeError, match=r"before 'attention.out_proj'.* in this version of torch, or take")
    with refused, torch.no_grad(), casting.forward_context():
        net(x)
