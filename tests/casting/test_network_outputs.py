"""Exact: the output of a network's last layer is left alone, whatever the network looks like."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.ops import quantize


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)  # registered before what runs before it
        self.embed, self.encoder = nn.Linear(4, 8), nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), (2, 3, 32, 32), "fc"),
    "mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=3, width_mult=0.25),
        (2, 3, 32, 32),
        "classifier.3",
    ),
    "transformer": (_Transformer, (2, 5, 4), "head"),
    "lstm": (_Recurrent, (2, 5, 4), "head"),
}


def _outputs(casting: ActivationCasting) -> set[str]:
    return {row["name"] for row in casting.describe() if row["activation"] == "output"}


def _on_grid(x: Tensor) -> bool:
    return torch.equal(quantize(x, "bfp8", rounding="nearest"), x)


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_last_layer_is_left_alone(name):
    build, shape, last = NETWORKS[name]
    torch.manual_seed(0)
    net = build()
    raw: dict[str, Tensor] = {}
    casting = ActivationCasting(net, seed=1).attach()

    def note(module, args, out):
        raw[names[module]] = (out[0] if isinstance(out, tuple) else out).clone()  # an in-place ReLU may come next

    names = {net.get_submodule(site.name): site.name for site in casting.sites}
    for module in names:  # hooks put on later run later: they see what the next layer gets
        module.register_forward_hook(note)
    x = torch.randn(shape)
    with casting.forward_context():
        first = net(x)
    assert _outputs(casting) == {last}
    assert not _on_grid(first)
    inner = {at: out for at, out in raw.items() if at != last}
    assert inner
    assert all(_on_grid(out) for out in inner.values())
    assert all(torch.isfinite(out).all() for out in inner.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_forward_that_finds_the_last_layer_gives_what_later_ones_give(name):
    build, shape, _ = NETWORKS[name]
    torch.manual_seed(0)
    net, x = build(), torch.randn(shape)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def run(learned: dict | None) -> tuple[Tensor, list[Tensor], dict]:
        twin = copy.deepcopy(net)
        casting = ActivationCasting(twin, seed=1).attach()
        if learned is not None:
            casting.load_state_dict({**learned, "forwards": 0, "evaluations": 0})
        with casting.forward_context():
            out = twin(x)
        out.square().sum().backward()
        return out, [p.grad for p in twin.parameters() if p.grad is not None], casting.state_dict()

    first, first_grads, state = run(None)
    later, later_grads, _ = run(state)
    assert torch.equal(first, later)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, later_grads, strict=True))


def _heads(kind: str) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 1)

        def forward(self, x: Tensor):
            h = F.relu(self.body(x))
            outputs = {
                "tuple": lambda: (self.a(h), self.b(h)),
                "mapping": lambda: {"a": self.a(h), "rest": [self.b(h), 3]},
                "squeezed": lambda: (self.a(h), self.b(h).squeeze(1)),
                "softmax": lambda: (F.log_softmax(self.a(h), 1), torch.sigmoid(self.b(h))),
                "features": lambda: (self.a(h), self.b(h), h),
            }
            return outputs[kind]()

    return Net()


@pytest.mark.parametrize("kind", ["tuple", "mapping", "squeezed", "softmax", "features"])
@pytest.mark.parametrize("times", [1, 2])
def test_every_output_of_a_network_with_several_heads_is_left_alone(kind, times):
    torch.manual_seed(0)
    net, x = _heads(kind), torch.randn(5, 4)
    casting = ActivationCasting(net, seed=1).attach()
    for _ in range(times):
        with casting.forward_context():
            out = net(x)
    assert {"a", "b"} <= _outputs(casting)
    assert "body" not in _outputs(casting)
    casting.remove()
    a, b = (out["a"], out["rest"][0]) if kind == "mapping" else out[:2]
    if kind == "features":
        assert _on_grid(out[2])  # used inside, so rounded inside and out
    assert not _on_grid(a)
    assert not _on_grid(b if b.ndim > 1 else b[None])


class _Lit(pl.LightningModule):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.encoder, self.head = self.net[:2], self.net[2]
        self.first, self.how = self.net[0], how
        self.logits: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = {
            "self": lambda: self(x),
            "net": lambda: self.net(x),
            "parts": lambda: self.head(self.encoder(x).flatten(1)),
            "loose": lambda: self.head(F.relu(self.first(x))),
        }[self.how]()
        self.logits.append(logits.detach())
        return F.cross_entropy(logits, y) + F.relu(logits).mean()


@pytest.mark.parametrize("how", ["self", "net", "parts", "loose"])
@pytest.mark.parametrize("redirected", [False, True])
def test_a_lightning_module_may_call_its_network_in_any_way(how, redirected):
    """All four ways of writing the same training step give the same casts; keys differ where calls differ."""
    torch.manual_seed(0)
    module, batch = _Lit(how), (torch.randn(6, 4), torch.tensor([0, 1, 2] * 2))
    casting = ActivationCasting(module, seed=1).attach()
    inputs: list[Tensor] = []
    module.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    for _ in range(2):
        with casting.forward_context():
            if redirected:  # as Lightning's strategies do under DDP
                original = module.forward

                def step(*args, original=original):
                    module.forward = original
                    return module.training_step(*args)

                module.forward = step
                module(batch, 0).backward()
            else:
                module.training_step(batch, 0).backward()
    assert all(not _on_grid(logits) for logits in module.logits)
    assert all(_on_grid(hidden) for hidden in inputs)
    assert len(inputs) == 2
    casting.remove()


def test_calling_forward_directly_is_warned_of():
    module = _Lit("forward")
    module.training_step = lambda batch, index: module.forward(batch[0])
    casting = ActivationCasting(module, seed=1).attach()
    with (
        casting.forward_context(),
        pytest.warns(UserWarning, match=r"`self.forward\(...\)` of _Lit was called directly"),
    ):
        module.training_step((torch.randn(2, 4),), 0)
    casting.remove()


def test_a_network_between_two_networks_is_cast_and_the_last_is_not():
    torch.manual_seed(0)
    nets = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 8), nn.Tanh()), "b": nn.Sequential(nn.Linear(8, 3))})
    casting = ActivationCasting(nets, seed=1).attach()
    x = torch.randn(6, 4)
    seen = []
    nets["b"][0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    results = []
    for _ in range(2):
        with casting.forward_context():
            hidden = nets["a"](x)
            results.append((hidden, nets["b"](hidden)))
    for (hidden, out), given in zip(results, seen, strict=True):
        assert not _on_grid(hidden)
        assert _on_grid(given)
        assert not _on_grid(out)
    casting.remove()
