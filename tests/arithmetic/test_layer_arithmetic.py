"""Layers in integers: the exact product, with the simulation's gradients, refused and reported by name."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.small_resnet import SmallResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import BlockFloatingPoint, EnsembleEvaluation, LowPrecisionSGLD, PosteriorEnsemble, SampleBank
from lightning_lpsgld.arithmetic import ArithmeticRefusal, capability, layers
from lightning_lpsgld.arithmetic.capability import VARIABLE
from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.ops import encode, quantize
from lightning_lpsgld.predictive import bayesian_model_average, layer_arithmetic


@pytest.fixture(autouse=True)
def _everything_pays(monkeypatch):
    monkeypatch.setattr(layers, "_WORTHWHILE", 0)


def _on_grid(net: nn.Module, fmt: str = "bfp8") -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(quantize(p, fmt, rounding="nearest"))
    return net


def _mlp(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 3))
    return _on_grid(net)


class _Convolutions(nn.Module):
    """A stem, then layers of every kind that integers cover, each after an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1),
                nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), nn.Conv2d(8, 8, 3, padding="same"),
            ]
        )  # fmt: skip
        self.line, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for layer in self.layers:
            x = F.relu(layer(x))
        x = F.relu(self.line(x.flatten(2)))
        return self.head(x.flatten(1))


NETWORKS = {
    "mlp": (_mlp, (5, 6), 2),
    "convolutions": (lambda: _on_grid(_Convolutions()), (2, 3, 8, 8), 7),
    "resnet": (lambda: _on_grid(SmallResNet(8)), (2, 3, 32, 32), 19),
}


def _run(net: nn.Module, x: Tensor, arithmetic: str, fmt: str = "bfp8", **options):
    """Output, gradients and report; a training step, then an evaluation."""
    net = copy.deepcopy(net).train()
    casting = ActivationCasting(net, fmt, fmt, seed=3, **options).attach()
    with layer_arithmetic(net, arithmetic) as running:
        with casting.forward_context():
            out = net(x)
        out.square().sum().backward()
        net.eval()
        with torch.no_grad(), casting.forward_context():
            evaluated = net(x)
        report = {} if running is None else running.report()
    casting.remove()
    return [out.detach(), evaluated], [p.grad for p in net.parameters()], report


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("saved", ["full", "codes"])
def test_a_network_agrees_with_its_simulation(name, saved):
    """Sums of these sizes are exact in float32 as well, so that both arithmetics have the same bits throughout."""
    make, shape, expected = NETWORKS[name]
    net, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    outputs, gradients, report = _run(net, x, "auto", saved_activations=saved)
    plain_outputs, plain_gradients, none = _run(net, x, "simulated")
    assert not none
    if capability().onednn:
        assert list(report.values()).count("integer") == expected
    for got, plain in zip(outputs + gradients, plain_outputs + plain_gradients, strict=True):
        # bias and a last sum in floats: a few units in the last place of the largest element
        assert (got - plain).abs().max() <= 4 * torch.finfo(torch.float32).eps * plain.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("fmt", ["bfp8", "fixed8.4", BlockFloatingPoint(8, block_dim=None), "bfp6"], ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_a_layer_is_the_exact_product_of_its_codes(fmt, activation):
    net, x = _mlp(activation).eval(), torch.randn(7, 6, generator=torch.Generator().manual_seed(4))
    casting = ActivationCasting(net, fmt, None, seed=0).attach()
    seen: list[tuple[Tensor, Tensor]] = []
    net[2].register_forward_hook(lambda layer, args, out: seen.append((args[0].detach(), out.detach())), prepend=True)
    with layer_arithmetic(net, "integer") as running, torch.no_grad(), casting.forward_context():
        net(x)
    assert running.report()["2"] == "integer"
    given, out = seen[0]
    codes = encode(given, fmt, rounding="nearest")
    assert torch.equal(codes.codes.double().abs() > 0, given != 0)
    exact = given.double() @ net[2].weight.double().t()  # products of 8 by 8 bits, 16 terms: exact in float64
    assert torch.equal(out, exact.float() + net[2].bias)


def test_first_layer_and_what_follows_a_pool_are_reported():
    net, x = _on_grid(SmallResNet(4)), torch.randn(2, 3, 32, 32)
    _, _, report = _run(net, x, "auto")
    assert report["conv1"] == "its input is the network's, which is not rounded"
    assert report["linear"] == "its input is not a rounded activation"


def test_integer_refuses_with_the_layers_name():
    net, x = _on_grid(SmallResNet(4)), torch.randn(2, 3, 32, 32)
    with pytest.raises(ArithmeticRefusal, match=r"layer 'linear' cannot run in integers: its input is not a rounded"):
        _run(net, x, "integer")
    net = _mlp()
    net[2].weight.data.normal_()
    with pytest.raises(ArithmeticRefusal, match=r"layer '2' .* its weight does not lie on a grid of 8 bits per row"):
        _run(net, torch.randn(2, 6), "integer")
    with pytest.raises(ArithmeticRefusal, match=r"layer '2' .* codes of e4m3 are not integers"):
        _run(_mlp(), torch.randn(2, 6), "integer", fmt="e4m3")
    with (
        pytest.raises(ArithmeticRefusal, match="activations of Sequential are not rounded"),
        layer_arithmetic(net, "integer"),
    ):
        pass
    with pytest.raises(ValueError, match=r"`arithmetic` must be one of .* got 'fast'"), layer_arithmetic(net, "fast"):
        pass


def test_small_layers_are_simulated(monkeypatch):
    monkeypatch.setattr(layers, "_WORTHWHILE", 10**9)
    _, _, report = _run(_mlp(), torch.randn(2, 6), "auto")
    assert set(report.values()) == {
        "its input is the network's, which is not rounded", "it is too small for integers to pay",
    }  # fmt: skip


@pytest.mark.parametrize("mask", ["no-onednn", "no-vnni", "no-onednn,no-vnni"])
def test_without_kernels_auto_simulates_and_integer_takes_doubles(mask, monkeypatch):
    monkeypatch.setenv(VARIABLE, mask)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    plain, _, _ = _run(_mlp(nn.Tanh), x, "simulated")
    outputs, _, report = _run(_mlp(nn.Tanh), x, "auto")
    assert "integer" not in report.values()
    assert "integers are no faster than floats here" in report["2"]
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain))
    forced, _, report = _run(_mlp(nn.Tanh), x, "integer")
    assert report == {"0": "its input is the network's, which is not rounded", "2": "integer", "4": "integer"}
    assert torch.allclose(forced[1], plain[1], atol=1e-6)


def test_a_weight_that_changes_in_place_is_read_again():
    net, x = _mlp().eval(), torch.randn(4, 6)
    casting = ActivationCasting(net, seed=0).attach()
    with torch.no_grad(), layer_arithmetic(net, "integer"), casting.forward_context():
        first = net(x)
        net[4].weight.mul_(2)
        net[4].bias.mul_(2)
        second = net(x)
    assert torch.equal(second, 2 * first)


def test_codes_follow_views_and_are_not_taken_from_what_is_none():
    class Net(nn.Module):
        def __init__(self, change):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.change = nn.Linear(4, 4), nn.Linear(4, 2), change

        def forward(self, x):
            return self.b(self.change(F.relu(self.a(x))))

    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(6))
    for change, reason in (
        (lambda h: h.mul_(2), "its input is not a rounded activation"),
        (lambda h: h.t(), "its input is a part, or a transposed view, of a cast tensor"),
        (lambda h: h[1:3], "its input is a part, or a transposed view, of a cast tensor"),
        (lambda h: h.unflatten(1, (2, 2)).transpose(1, 2).flatten(1), "its input is not a rounded activation"),
        (lambda h: h[:, None, :], "integer"),
        (lambda h: h.unsqueeze(1).expand(4, 3, 4), "integer"),
    ):
        net = _on_grid(Net(change)).eval()
        casting = ActivationCasting(net, seed=0).attach()
        with torch.no_grad(), layer_arithmetic(net, "auto") as running, casting.forward_context():
            out = net(x)
            assert torch.equal(out, net(x))
        with torch.no_grad(), casting.forward_context():
            assert torch.allclose(out, net(x), atol=1e-6)
        assert running.report()["b"] == reason


def test_nothing_is_left_behind():
    net = _mlp().eval()
    casting = ActivationCasting(net, seed=0).attach()
    with layer_arithmetic(net, "auto"), torch.no_grad():
        net(torch.randn(2, 6))
    assert not torch.overrides._get_current_function_mode_stack()
    caster = casting._session.caster
    assert (caster.asked, len(caster.book), caster.taken) == (0, 0, set())


class _Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = test_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def _loader() -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), 16)


def _trainer(plugin: LowPrecisionSGLD, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_epochs=1, plugins=[plugin], callbacks=list(callbacks), logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def test_the_trainer_fits_in_integers_as_in_the_simulation():
    losses, weights = [], []
    x, y = _loader().dataset.tensors
    for arithmetic in ("integer", "simulated"):
        L.seed_everything(0, verbose=False)
        plugin, module = LowPrecisionSGLD(seed=1, arithmetic=arithmetic), _Module()
        _trainer(plugin).fit(module, _loader())
        weights.append([p.detach().clone() for p in module.parameters()])
        with torch.no_grad():
            losses.append(float(F.cross_entropy(module(x), y)))
        words = (
            "forward 2 of 3 layers in integers; 1 simulated: its input is the network's, which is not rounded (net.0)"
        )
        assert words in plugin.card.arithmetic if arithmetic == "integer" else "simulated" in plugin.card.arithmetic
        assert plugin.card.arithmetic in str(plugin.card)
        expected = {"net.2": "integer", "net.4": "integer"} if arithmetic == "integer" else {}
        assert {name: how for name, how in plugin.layer_report.items() if how == "integer"} == expected
    # sums of 16 terms are exact in float32, up to the bias: a draw would have to lie between two neighbouring floats
    same = sum(int((a == b).sum()) for a, b in zip(*weights))
    assert same >= 0.99 * sum(a.numel() for a in weights[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_ensemble_scores_are_those_of_the_simulation():
    bank, module = SampleBank(), _Module()
    for step in range(3):
        for p in module.parameters():
            torch.nn.init.normal_(p)
        _on_grid(module)
        bank.add(module, step=step, formats={name: "bfp8" for name, _ in module.named_parameters()})
    scores = {}
    for arithmetic in ("simulated", "auto", "integer"):
        callback = EnsembleEvaluation(bank, arithmetic=arithmetic)
        _trainer(LowPrecisionSGLD(seed=1), callback).test(module, _loader(), verbose=False)
        scores[arithmetic] = callback.scores
        integers = [name for name, how in callback.layers.items() if how == "integer"]
        assert integers == ([] if arithmetic == "simulated" or not capability().onednn else ["net.2", "net.4"])
    for arithmetic in ("auto", "integer"):
        assert scores[arithmetic] == pytest.approx(scores["simulated"], abs=1e-5)


def test_bayesian_model_average_takes_it_too():
    bank, net = SampleBank(), _mlp()
    bank.add(net, step=0)
    casting = ActivationCasting(net, seed=0).attach()
    batches = [(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(8, dtype=torch.long))]
    results = [
        bayesian_model_average(bank, net, batches, arithmetic=arithmetic).predictive.probabilities
        for arithmetic in ("simulated", "auto", "integer")
    ]
    casting.remove()
    assert torch.allclose(results[0], results[1], atol=1e-6)
    assert torch.allclose(results[0], results[2], atol=1e-6)
    with pytest.raises(ArithmeticRefusal, match="activations of Sequential are not rounded"):
        bayesian_model_average(bank, net, batches, arithmetic="integer")


@pytest.mark.skipif(not capability().onednn, reason="needs integer products")
def test_members_of_a_posterior_ensemble_run_in_integers(monkeypatch):
    """Streamed members multiply codes where casts make them; layers are named though their weights are replaced."""
    net, x = _mlp(), torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    bank, raw = SampleBank(), SampleBank()
    for step in range(2):
        for p in net.parameters():
            torch.nn.init.normal_(p)
        raw.add(net, step=step)
        _on_grid(net)
        bank.add(net, step=step, formats={name: "bfp8" for name, _ in net.named_parameters()})
    casting = ActivationCasting(net, seed=0).attach()
    means, products, run = {}, [], layers._run
    monkeypatch.setattr(layers, "_run", lambda *args: products.append(1) or run(*args))
    for arithmetic in ("simulated", "auto", "integer"):
        ensemble = PosteriorEnsemble(net, bank, task="multiclass", arithmetic=arithmetic)
        products.clear()
        means[arithmetic] = ensemble(x).mean
        assert ensemble.how == "streamed"
        assert len(products) == (0 if arithmetic == "simulated" else 2 * 2)  # two members, all layers but the first
    assert torch.allclose(means["simulated"], means["auto"], atol=1e-6)
    assert torch.equal(means["integer"], means["auto"])
    with pytest.raises(ArithmeticRefusal, match="layer '2' cannot run in integers: its weight does not lie on a grid"):
        PosteriorEnsemble(net, raw, task="multiclass", arithmetic="integer")(x)
    casting.remove()
    with pytest.raises(ArithmeticRefusal, match="activations of Sequential are not rounded"):
        PosteriorEnsemble(net, bank, task="multiclass", arithmetic="integer")(x)
    assert PosteriorEnsemble(net, bank, task="multiclass").how == "stacked"
    with pytest.raises(ValueError, match="members='stacked' computes all members at once"):
        PosteriorEnsemble(net, bank, members="stacked", arithmetic="integer")
    with pytest.raises(ValueError, match="PosteriorEnsemble: `arithmetic` must be one of"):
        PosteriorEnsemble(net, bank, arithmetic="int8")


def test_arguments_are_refused_early():
    with pytest.raises(ValueError, match="`arithmetic` must be one of"):
        LowPrecisionSGLD(arithmetic="int8")
    with pytest.raises(ValueError, match="EnsembleEvaluation: `arithmetic` must be one of"):
        EnsembleEvaluation(arithmetic="int8")
    with pytest.raises(ValueError, match="arithmetic='integer' multiplies codes of activations, but codes of e4m3"):
        LowPrecisionSGLD(arithmetic="integer", activations="e4m3")
    with pytest.raises(ValueError, match="but activations are not rounded"):
        LowPrecisionSGLD(arithmetic="integer", activations=None)
