"""The ops under ``torch.compile``: one whole graph, the same bits, no recompilation per step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from helpers.toy_format import BlockLogarithmic
from torch import Tensor

from lightning_lpsgld.formats import FixedPoint
from lightning_lpsgld.ops import decode, encode, library, quantize, quantize_variance_corrected
from lightning_lpsgld.random import DrawKey

SEED = 2**63 + 5  # does not fit a signed 64-bit integer


class Counting:
    """A compiler backend that runs the graph as it is and counts how often it was asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        self.graphs += 1
        return graph.forward


def every_op(x: Tensor, fmt: object, key: DrawKey) -> Tensor:
    """All four ops in one function; gradients pass beside them."""
    rounded = quantize(x, fmt, key=key)
    corrected = quantize_variance_corrected(x, 1e-3, fmt, key=key)
    spread = quantize_variance_corrected(x, x * x, fmt, key=key)
    return x + rounded + corrected + spread + decode(encode(x, fmt))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fmt", ["bfp8", FixedPoint(8, 6), "e4m3", "mxfp8e4m3", BlockLogarithmic(8)], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_ops_keep_the_graph_whole_and_the_bits(fmt, backend):
    x = torch.linspace(-1.5, 1.5, 32).reshape(4, 8).requires_grad_()
    compiled = torch.compile(every_op, fullgraph=True, backend=backend)
    out = compiled(x, fmt, DrawKey(SEED, step=9, stream=3))
    assert torch.equal(out, every_op(x, fmt, DrawKey(SEED, step=9, stream=3)))
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_step_passed_as_argument_recompiles_once():
    counting = Counting()
    compiled = torch.compile(lambda x, key: quantize(x, "bfp8", key=key), fullgraph=True, backend=counting)
    x = torch.linspace(-1.5, 1.5, 32).reshape(4, 8)
    for step in range(10, 16):
        key = DrawKey(SEED, step=step, stream=3)
        assert torch.equal(compiled(x, key), quantize(x, "bfp8", key=key))
    assert counting.graphs == 2


class Keyed(torch.nn.Module):
    """A module that keeps its key as a tensor and counts its calls in it."""

    def __init__(self) -> None:
        super().__init__()
        self.key = library.key_tensor(DrawKey(SEED, step=9, stream=3))

    def forward(self, x: Tensor) -> Tensor:
        return library.quantize_keyed(x, "bfp8", "stochastic", self.key, "auto")


def test_a_key_tensor_never_recompiles():
    counting, module = Counting(), Keyed()
    compiled = torch.compile(module, fullgraph=True, backend=counting)
    x = torch.linspace(-1.5, 1.5, 32).reshape(4, 8)
    for step in range(9, 15):
        assert torch.equal(compiled(x), quantize(x, "bfp8", key=DrawKey(SEED, step=step, stream=3)))
        module.key[1] += 1
    assert counting.graphs == 1


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "fixed8.6", "e4m3", "mxfp8e4m3"])
def test_fake_implementations_promise_what_the_ops_return(fmt):
    checks = ("test_schema", "test_faketensor")
    x = torch.linspace(-1.5, 1.5, 120).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    torch.library.opcheck(library.quantize, (x, fmt, "stochastic", 1, 2, 3, 4, "auto"), test_utils=checks)
    torch.library.opcheck(library.encode, (x, fmt, "stochastic", 1, 2, 3, 4, "auto"), test_utils=checks)
    vc = library.quantize_variance_corrected
    torch.library.opcheck(vc, (x, None, 1e-3, fmt, 1, 2, 3, 4, "auto"), test_utils=checks)
    codes, exponents = library.encode(x, fmt, "nearest", 0, 0, 0, 0, "auto")
    torch.library.opcheck(library.decode, (codes, exponents, fmt, torch.float32, "auto"), test_utils=checks)


FIRST_TRACE = """
import sys, torch
import lightning_lpsgld
from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.random import DrawKey

every = [getattr(lightning_lpsgld, name) for name in lightning_lpsgld.__all__]
nodes = {"lightning_lpsgld.ops.library", "lightning_lpsgld.casting.nodes"}
assert not nodes & set(sys.modules), "operators are registered without a graph"
x, key = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), DrawKey(1, step=2)
compiled = torch.compile(lambda x, key: quantize(x, "bfp8", key=key), fullgraph=True, backend="eager")
assert torch.equal(compiled(x, key), quantize(x, "bfp8", key=key))

def outputs(prepare):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    ActivationCasting(net, seed=3).attach()
    net.train()
    net = prepare(net)
    return torch.stack([net(x) for _ in range(3)])

assert torch.equal(outputs(lambda net: net), outputs(lambda net: torch.compile(net, backend="eager")))
print(sorted(nodes & set(sys.modules)))
"""


def test_operators_are_registered_when_a_graph_is_first_traced():
    """In a process of its own: importing everything registers none, and the first trace of each finds its node."""
    done = subprocess.run([sys.executable, "-c", FIRST_TRACE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['lightning_lpsgld.casting.nodes', 'lightning_lpsgld.ops.library']"
