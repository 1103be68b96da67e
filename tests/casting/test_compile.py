"""Coupled: a compiled network keeps its graph whole, and casts as the same network does uncompiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.casting.draws import ForwardCounter
from lightning_lpsgld.casting.nodes import open_forward
from lightning_lpsgld.ops.library import cast_node

STEPS = 4


class Net(nn.Module):
    """Layers, an activation module, an activation function, and a last layer under a softmax."""

    def __init__(self, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.middle, self.last = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.function = nn.BatchNorm1d(8), function

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.middle(self.act(self.first(x))))
        if self.function is not None:
            h = self.function(h)
        return F.log_softmax(self.last(h), dim=-1)


class Counting:
    """A compiler backend that counts how often it was asked."""

    def __init__(self, backend: str) -> None:
        from torch._dynamo import lookup_backend

        self.graphs, self.inner = 0, lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return self.inner(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _loss(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().sum()


def _compiled(net: nn.Module, how: str, backend: Any) -> Callable[[Tensor], Tensor]:
    """The loss of a network of which a part, or all, is compiled as one graph."""
    if how == "plain":
        return lambda x: _loss(net, x)
    if how == "compile()":
        net.compile(backend=backend, fullgraph=True)
        return lambda x: _loss(net, x)
    if how == "torch.compile":
        wrapped = torch.compile(net, backend=backend, fullgraph=True)
        return lambda x: _loss(wrapped, x)
    return torch.compile(lambda x: _loss(net, x), backend=backend, fullgraph=True)


def _train(
    net: nn.Module, how: str, backend: Any = None, **options: Any
) -> tuple[list[Tensor], dict[str, Any], list[int]]:
    """Losses and gradients of a few steps, the casting's state, and the number of graphs after each step."""
    net = copy.deepcopy(net)
    casting = ActivationCasting(net, seed=7, **options).attach()
    loss_of = _compiled(net, how, backend)
    found, graphs = [], []
    for step in range(STEPS):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).requires_grad_()
        net.zero_grad()
        with casting.forward_context():
            loss = loss_of(x)
        loss.backward()
        found += [loss.detach(), x.grad, *(p.grad for p in net.parameters())]
        graphs.append(getattr(backend, "graphs", 0))
    state = casting.state_dict()
    casting.remove()
    return found, state, graphs


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["compile()", "torch.compile", "whole loss"])
def test_whole_graph_same_bits_and_no_compilation_per_step(how, backend):
    counting, net = Counting(backend), Net()
    found, state, graphs = _train(net, how, counting)
    expected, expected_state, _ = _train(net, "plain")
    assert _same(found, expected)
    assert state == expected_state
    assert graphs[0] == 0  # the first forward finds the outputs, uncompiled
    assert 1 <= graphs[1] == graphs[-1]


@pytest.mark.parametrize("formats", [("bfp8", None), (None, "bfp8"), ("fixed8.5", "e4m3")], ids=str)
def test_each_direction_alone(formats):
    options = dict(zip(("activations", "errors"), formats))
    net = Net()
    found, _, _ = _train(net, "whole loss", Counting("aot_eager"), **options)
    assert _same(found, _train(net, "plain", **options)[0])
    assert not _same(found, _train(net, "plain")[0])


FUNCTIONS = {
    "torch.tanh": torch.tanh,
    "F.gelu": F.gelu,
    "Tensor.sigmoid": torch.Tensor.sigmoid,
    "Tensor.tanh_": lambda h: h.tanh_(),
    "F.silu in place": lambda h: F.silu(h, inplace=True),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_cast_in_the_graph(name, backend):
    net = Net(FUNCTIONS[name])
    found, _, graphs = _train(net, "compile()", Counting(backend))
    assert _same(found, _train(net, "plain")[0])
    assert not _same(found, _train(net, "plain", functional=False)[0])
    assert graphs[1] == graphs[-1]


@pytest.mark.parametrize("function", [F.tanh, torch.tanh_], ids=["F.tanh", "torch.tanh_"])
def test_functions_that_compilation_hides_are_named(function):
    with pytest.warns(UserWarning, match=r"not cast in a compiled graph: tanh\."):
        _train(Net(function), "whole loss", Counting("aot_eager"))


def test_codes_fall_back_to_full_and_say_so():
    net = Net(torch.tanh)
    with pytest.warns(UserWarning, match="'codes' has no effect inside a compiled graph") as caught:
        found, _, graphs = _train(net, "compile()", Counting("aot_eager"), saved_activations="codes")
    assert len([w for w in caught if "'codes'" in str(w.message)]) == 1
    assert _same(found, _train(net, "plain")[0])
    assert graphs[1] == graphs[-1]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_evaluation_between_training_steps(rounding):
    def run(how: str) -> list[Tensor]:
        net, counting = Net(), Counting("aot_eager")
        casting = ActivationCasting(net, seed=3, eval_rounding=rounding).attach()
        call = _compiled(net, how, counting)
        x, found = torch.linspace(-1, 1, 20).reshape(5, 4), []
        for step in range(6):
            net.train(step % 3 == 0)
            with torch.set_grad_enabled(step % 3 == 0), casting.forward_context():
                found.append(call(x).detach())
        return [*found, torch.tensor([casting.state_dict()[name] for name in ("forwards", "evaluations")])]

    assert _same(run("whole loss"), run("plain"))


@pytest.mark.filterwarnings("ignore:Activation casting cannot see all of")
def test_a_compiled_part_that_is_called_twice():
    counting = Counting("aot_eager")
    torch.manual_seed(1)
    part = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8))
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), part, nn.Tanh(), part, nn.Linear(8, 2))
    found = copy.deepcopy(plain)
    found[2].compile(backend=counting, fullgraph=True)  # not copied by deepcopy
    assert _same(_run(found), _run(plain))
    assert counting.graphs > 0


def _run(net: nn.Module, context: bool = True) -> list[Tensor]:
    """Losses and gradients of a few steps of a network as it is."""
    casting = ActivationCasting(net, seed=7).attach()
    found = []
    for step in range(STEPS):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        net.zero_grad()
        with casting.forward_context() if context else nullcontext():
            loss = _loss(net, x)
        loss.backward()
        found += [loss.detach(), *(p.grad for p in net.parameters())]
    casting.remove()
    return found


@pytest.mark.filterwarnings("ignore:Activation casting cannot see all of")
def test_without_the_context_the_first_forward_breaks_its_graph_and_later_ones_agree():
    compiled = Net()
    compiled.compile(backend="aot_eager")
    assert _same(_run(compiled, context=False), _run(Net(), context=False))


def test_a_forward_that_raised_leaves_nothing_behind():
    def run(how: str) -> Tensor:
        net = Net()
        casting = ActivationCasting(net, seed=7).attach()
        call = _compiled(net, how, Counting("aot_eager"))
        x = torch.ones(5, 4)
        with casting.forward_context():
            net(x)
        with pytest.raises(RuntimeError):
            call(x[:, :3])
        casting.load_state_dict({**casting.state_dict(), "forwards": 5})
        return call(x)

    assert torch.equal(run("compile()"), run("plain"))


def test_checkpointing_around_a_compiled_network_is_refused_in_backward():
    net = Net()
    casting = ActivationCasting(net, seed=7).attach()
    net.compile(backend="aot_eager", fullgraph=True)
    x = torch.ones(5, 4, requires_grad=True)
    with casting.forward_context():
        net(x).sum().backward()
    with casting.forward_context():
        loss = checkpoint(net, x, use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="run again in backward"):
        loss.backward()


@pytest.mark.parametrize("formats", [("bfp8", "bfp8"), (None, "fixed8.5"), ("e4m3", None)], ids=str)
def test_the_nodes_keep_what_their_fake_implementations_promise(formats):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    x = torch.linspace(-1.5, 1.5, 120).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    key = torch.tensor([-5, 3])
    activation, error = formats
    args = (x, key, activation, 1, error, 2, "stochastic", "auto")
    torch.library.opcheck(cast_node, args, test_utils=checks)
    counter = ForwardCounter(0, 0, "nearest")
    for training in (True, False):
        torch.library.opcheck(open_forward, (counter.state, training), test_utils=checks[:2])


class Lit(L.LightningModule):
    """A user's module."""

    def __init__(self, compiled: str | None = None, backend: Any = None) -> None:
        super().__init__()
        self.net, self.seen = Net(), []
        if compiled == "a part":
            self.net.compile(backend=backend, fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.nll_loss(torch.tanh(self(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"scores": self(batch[0])}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(outputs["scores"].clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(tmp_path: Any, compiled: str | None) -> tuple[list[Tensor], int]:
    torch._dynamo.reset()
    counting = Counting("aot_eager")
    module = Lit(compiled, counting)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 4, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    trainer = L.Trainer(
        max_epochs=3, plugins=[LowPrecisionSGLD(seed=1)], accelerator="cpu", devices=1, default_root_dir=tmp_path,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    whole = torch.compile(module, backend=counting, fullgraph=True) if compiled == "all" else module
    trainer.fit(whole, loader, loader)
    return [*(p.detach() for p in module.parameters()), *module.seen], counting.graphs


@pytest.mark.filterwarnings("ignore")  # Lightning on loaders without workers
@pytest.mark.parametrize("compiled", ["a part", "all"])
def test_a_compiled_lightning_module_trains_as_an_uncompiled_one(compiled, tmp_path):
    found, graphs = _fit(tmp_path, compiled)
    expected, _ = _fit(tmp_path, None)
    assert _same(found, expected)
    assert 2 <= graphs <= 4  # training and validation, and where a part is compiled, its pre-hook


def test_channels_last_autocast_in_place_modules_and_inference_mode():
    def run(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
        )
        casting = ActivationCasting(net.to(memory_format=torch.channels_last), seed=1).attach()
        if compiled:
            net.compile(backend="aot_eager", fullgraph=True)
        found = []
        for step in range(STEPS):
            x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(step))
            x = x.contiguous(memory_format=torch.channels_last)
            net.zero_grad()
            with casting.forward_context(), torch.autocast("cpu", dtype=torch.bfloat16):
                loss = _loss(net, x)
            loss.backward()
            with torch.inference_mode(), casting.forward_context():
                found += [loss.detach(), *(p.grad for p in net.parameters()), net(x).clone()]
        return found

    assert _same(run(True), run(False))


def test_a_pickled_counter_goes_on_from_where_it_was_in_memory_of_its_own():
    counter = ForwardCounter(2**63 + 5, 1, "nearest")
    counter.open(True)
    counter.open(False)
    copied = pickle.loads(pickle.dumps(counter))
    for training in (False, True, True, False):
        assert copied.open(training) == counter.open(training)
    assert copied.state.data_ptr() != counter.state.data_ptr()
