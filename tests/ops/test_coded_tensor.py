"""A weight held as codes is its values to every operation; views of it stay codes; it is set by rounding to nearest."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_lpsgld.ops import CodedTensor, code_parameters_, encode, float_parameters_, quantize
from lightning_lpsgld.ops.coded import initialization, plain
from lightning_lpsgld.ops.coded_modules import parameters_made_as_codes

FORMATS = ("bfp8", "bfp8-tensor", "fixed8.6", "e4m3", "mxint8")


def made(fmt="bfp8", shape=(6, 8), seed=0):
    values = quantize(torch.randn(shape, generator=torch.manual_seed(seed)), fmt, rounding="nearest")
    return values, CodedTensor.of(values, fmt)


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(plain(a).contiguous().view(torch.int32), b.contiguous().view(torch.int32))


VIEWS = {
    "t": lambda x: x.t(),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0),
    "view": lambda x: x.view(2, 3, 8),
    "flatten": lambda x: x.flatten(),
    "slice of rows": lambda x: x[2:5],
    "slice of columns": lambda x: x[:, 1:4],
    "strided slice": lambda x: x[1::2, ::3],
    "slice of a transpose": lambda x: x.t()[3:6],
    "row": lambda x: x[4],
    "unsqueeze": lambda x: x.unsqueeze(1),
    "expand": lambda x: x.unsqueeze(0).expand(3, 6, 8),
    "chunk": lambda x: x.chunk(3)[1],
    "split": lambda x: x.split([1, 4, 1])[1],
    "unbind": lambda x: x.unbind(0)[5],
    "narrow": lambda x: x.narrow(1, 2, 3),
    "diagonal": lambda x: x.diagonal(),
    "unflatten": lambda x: x.unflatten(1, (2, 4)),
    "as_strided": lambda x: x.as_strided((2, 3), (8, 2), 9),
    "empty slice": lambda x: x[6:],
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("view", VIEWS)
def test_views_stay_codes_and_have_the_values(view, fmt):
    values, weight = made(fmt)
    seen, expected = VIEWS[view](weight), VIEWS[view](values)
    assert isinstance(seen, CodedTensor)
    assert seen.cell is weight.cell
    assert (seen.shape, seen.stride(), seen.storage_offset()) == (
        expected.shape, expected.stride(), expected.storage_offset(),
    )  # fmt: skip
    assert same_bits(seen, expected)


OPERATIONS = {
    "matmul": lambda w, x: x @ w.t(),
    "linear": lambda w, x: nn.functional.linear(x, w),
    "product": lambda w, x: w * x[:1],
    "sum": lambda w, x: w.sum(0),
    "embedding": lambda w, x: nn.functional.embedding(torch.tensor([[0, 3], [3, 5]]), w),
    "index": lambda w, x: w[torch.tensor([1, 1, 4])],
    "cat": lambda w, x: torch.cat([w, x, w.t().t()]),
    "where": lambda w, x: torch.where(w > 0, w, 0.0),
    "bits": lambda w, x: w.detach().view(torch.int32),
    "double": lambda w, x: w.double(),
    "item": lambda w, x: torch.tensor(w[0, 0].item()),
    "numpy": lambda w, x: torch.from_numpy(w.numpy()),
    "list": lambda w, x: torch.tensor(w.tolist()),
    "foreach": lambda w, x: torch._foreach_mul([w, x], 2.0)[0],
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_other_operation_takes_the_values(operation, fmt):
    values, weight = made(fmt)
    x = torch.randn(4, 8)
    found, expected = OPERATIONS[operation](weight, x), OPERATIONS[operation](values, x)
    assert type(plain(found)) is torch.Tensor
    assert torch.equal(plain(found), expected)


def test_results_are_plain_and_nothing_of_float_size_is_kept():
    """What autograd saves for backward of a linear layer is its input and coded views of the weight."""
    _, weight = made(shape=(16, 8))
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    weight = nn.Parameter(weight)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = nn.functional.linear(x, weight)
    assert type(out) is torch.Tensor
    assert {type(tensor) for tensor in kept if tensor.numel() == weight.numel()} == {CodedTensor}
    out.sum().backward()
    assert type(weight.grad) is torch.Tensor
    assert weight.grad.shape == weight.shape


def test_a_view_sees_what_is_set_later_and_autograd_refuses_it():
    values, weight = made()
    view = weight.t()
    weight.copy_(2 * values)
    assert same_bits(view, 2 * values.t())
    weight = nn.Parameter(weight)
    x = torch.randn(3, 8, requires_grad=True)
    out = x @ weight.t()
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_setting_rounds_to_nearest():
    values, weight = made("fixed8.3")
    other = torch.randn(6, 8)
    weight.copy_(other)
    assert same_bits(weight, quantize(other, "fixed8.3", rounding="nearest"))
    weight[1:3].fill_(0.3)
    assert torch.equal(weight[1:3] + 0, torch.full((2, 8), 0.25))
    assert same_bits(weight[3:], quantize(other, "fixed8.3", rounding="nearest")[3:])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = quantize(torch.empty(6, 8).uniform_(-1, 1), "fixed8.3", rounding="nearest")
        torch.manual_seed(1)
        assert same_bits(weight.uniform_(-1, 1), expected)
    weight.data = other
    assert same_bits(weight, quantize(other, "fixed8.3", rounding="nearest"))
    weight.data = CodedTensor.of(values, "fixed8.3")
    assert same_bits(weight, values)
    plain_target = torch.zeros(6, 8)
    assert torch.equal(plain_target.copy_(weight), values)


def test_a_nan_is_refused_and_changes_nothing():
    values, weight = made("fixed8.3")
    with pytest.raises(ValueError, match="NaN"):
        weight.copy_(torch.full((6, 8), float("nan")))
    assert same_bits(weight, values)


def test_in_place_arithmetic_is_refused_by_name():
    values, weight = made()
    for change in (lambda: weight.add_(1.0), lambda: weight[0].mul_(2.0), lambda: torch._foreach_add_([weight], 1.0)):
        with pytest.raises(TypeError, match=r"held as codes.*float_parameters_"):
            change()
    assert same_bits(weight, values)


def test_copies_are_codes_of_their_own():
    values, weight = made()
    for twin in (weight.clone(), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert isinstance(twin, CodedTensor)
        assert same_bits(twin, values)
        twin.zero_()
    assert same_bits(weight, values)
    assert type(weight.t().clone()) is torch.Tensor


def test_a_parameter_stays_one():
    _, weight = made()
    parameter = nn.Parameter(weight)
    parameter.grad = torch.ones(6, 8)
    for twin in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert isinstance(twin, nn.Parameter)
        assert isinstance(twin, CodedTensor)
        assert twin.requires_grad
    assert torch.equal(copy.deepcopy(parameter).grad, torch.ones(6, 8))
    assert parameter.to("cpu") is parameter


@pytest.mark.parametrize("fmt", FORMATS)
def test_saved_as_codes_and_read_with_weights_only(fmt):
    values, weight = made(fmt, shape=(64, 64))
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    assert file.tell() < 3 * weight.numel()
    file.seek(0)
    back = torch.load(file, weights_only=True)["weight"]
    assert back.format == weight.format
    assert same_bits(back, values)


def test_a_lossless_cast_stays_codes_and_knows_when_the_weight_moved():
    values, weight = made()
    half = weight.to(torch.bfloat16)
    assert isinstance(half, CodedTensor)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half + 0, values.bfloat16())
    assert torch.equal(half.t() + 0, values.t().bfloat16())
    weight.zero_()
    with pytest.raises(RuntimeError, match="changed after it was cast"):
        half + 0
    wide = CodedTensor.of(torch.tensor([1.0 + 2**-10]), "fixed16.12")
    assert type(wide.to(torch.bfloat16)) is torch.Tensor


def test_channels_last_weights_keep_their_memory_order():
    values = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    weight = CodedTensor.of(values, "bfp8")
    assert weight.stride() == values.stride()
    expected = quantize(values, "bfp8", rounding="nearest")
    assert torch.equal(weight[1:3, :, 2:] + 0, expected[1:3, :, 2:])


NETWORKS = {
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        torch.randn(2, 5, 16),
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
        torch.randn(2, 3, 6, 6),
    ),
    "lstm": (lambda: nn.LSTM(4, 3, 2), torch.randn(5, 2, 4)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "autocast"), [(n, False) for n in NETWORKS] + [("encoder", True), ("convolutions", True)]
)
def test_networks_compute_the_same_bits(name, autocast):
    """Forward, backward, evaluation and the encoder's fast path."""
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    twin = float_parameters_(code_parameters_(copy.deepcopy(net), "bfp8"))
    net = code_parameters_(net, "bfp8")
    assert all(isinstance(p, CodedTensor) for p in net.parameters())
    outs = []
    for each in (net, twin):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = each(x)
        out = out[0] if isinstance(out, tuple) else out
        out.float().square().mean().backward()
        with torch.no_grad():
            quiet = each.eval()(x)
        outs.append((out, quiet[0] if isinstance(quiet, tuple) else quiet))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])
    for mine, theirs in zip(net.parameters(), twin.parameters()):
        assert torch.equal(mine.grad, theirs.grad)
    assert net.state_dict().keys() == twin.state_dict().keys()
    twin.load_state_dict(net.state_dict())
    net.load_state_dict(twin.state_dict())
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(net.parameters(), twin.parameters()))


def test_tied_parameters_stay_tied_and_hooks_are_not_lost():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    net[1].weight = net[0].weight
    code_parameters_(net, "bfp8", lambda module, name, param: isinstance(module, nn.Embedding))
    assert net[1].weight is not net[0].weight, "only what was chosen is replaced"
    net[1].weight = net[0].weight
    assert float_parameters_(net)[1].weight is net[0].weight
    assert code_parameters_(net, "bfp8")[1].weight is net[0].weight
    hooked = nn.Linear(2, 2)
    hooked.weight.register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="`weight` of a Linear carries gradient hooks"):
        code_parameters_(hooked, "bfp8")
    assert type(hooked.bias.data) is torch.Tensor


def test_initialization_rounds_once():
    """Steps of an initializer work on floats; the result is rounded when the next tensor's turn comes."""
    _, weight = made()
    other = made()[1]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        expected = [nn.init.trunc_normal_(torch.empty(6, 8), std=0.1) for _ in range(2)]
        torch.manual_seed(2)
        with initialization():
            for each in (weight, other):
                nn.init.trunc_normal_(each, std=0.1)
            assert same_bits(weight, quantize(expected[0], "bfp8", rounding="nearest"))
            assert torch.equal(other + 0, expected[1]), "still open"
    assert same_bits(other, quantize(expected[1], "bfp8", rounding="nearest"))
    with pytest.raises(TypeError, match="held as codes"):
        other.mul_(2.0)


class Grown(nn.Module):
    """Initializes its parts by itself, has a parameter of its own, and ties two weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
        self.token = nn.Parameter(torch.randn(1, 8))
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.first.weight
        self.apply(self._reset)

    def _reset(self, module):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)


def test_a_network_made_as_codes_begins_where_its_floats_would():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        floats = Grown()
        torch.manual_seed(3)
        with parameters_made_as_codes("bfp8"):
            codes = Grown()
    assert all(isinstance(p, CodedTensor) for p in codes.parameters())
    assert codes.head.weight is codes.first.weight
    for (name, p), (_, q) in zip(codes.named_parameters(), floats.named_parameters()):
        assert same_bits(p.detach(), quantize(q.detach(), "bfp8", rounding="nearest")), name


def test_rows_are_read_and_written_by_themselves():
    values, weight = made(shape=(2000, 300))
    runs = weight.cell.runs()
    assert len(runs) > 1
    assert runs[0][0] == 0
    assert runs[-1][1] == 2000
    start, stop = runs[1]
    weight.cell.set(2 * values[start:stop], start, stop)
    values[start:stop] *= 2
    assert same_bits(weight, values)
    assert len(weight.cell.runs(encode(values, "bfp8-tensor").format)) == 1
    assert len(made("bfp8-tensor", (2000, 300))[1].cell.runs()) == 1


_MEMORY = """
import os, torch
from pathlib import Path
from lightning_lpsgld.ops.memory import return_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

known, large, small = return_memory(), [], []
for _ in range(20):
    large.append(torch.ones(2**20))
    small.append(torch.ones(2**14))
full = resident()
del large
print(known, full - resident())
"""


def test_memory_of_large_tensors_goes_back_to_the_system():
    """Although smaller ones that stay were made between them; in a process whose memory nothing else has used."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    known, given_back = done.stdout.split()
    if known == "False":
        pytest.skip("the C library is not glibc")
    assert int(given_back) > 0.9 * 20 * 2**22
