"""What goes into a bank comes out bit for bit, and what cannot is refused."""

import io
import math
import re

import pytest
import torch
from bank_samples import Net, assert_holds, contents, expected, fill, filled_bank
from helpers.toy_format import BlockLogarithmic
from torch import nn

from lightning_lpsgld.bank import BankError, SampleBank, SampleInfo, decode_into_, module_tensors
from lightning_lpsgld.formats import check_dtype, parse_format
from lightning_lpsgld.ops import decode, encode, quantize

FORMATS = [
    *("fixed8.6", "fixed8.8", "fixed4.2", "fixed16.10", "fixed24.12", "fixed8.6s"),
    *("bfp8", "bfp8-tensor", "bfp8-dim1", "bfp4", "bfp12", "bfp8b32", "bfp8e4", "mxint8"),
    *("e4m3", "e5m2", "e2m1", "bf16", "fp16", "tf32"),
    *("mxfp8e4m3", "mxfp8e5m2-fit", "mxfp6e3m2", "mxfp4e2m1b3"),
    str(BlockLogarithmic(16)),  # known by its name as any other, once its file was imported
]
PLACES = ("memory", "directory")


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "bank"


def reopened(bank):
    return bank if bank.path is None else SampleBank.open(bank.path)


def awkward_values(shape, dtype):
    """Ordinary values, zeros, a zero row, a row of subnormals, a row near the largest float."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    if x.ndim == 2 and x.shape[0] >= 4:
        x[0] = 0.0
        x[1] = torch.finfo(dtype).smallest_normal * 2.0**-9 * torch.arange(x.shape[1])
        x[2, 0], x[3] = 0.0, torch.finfo(dtype).max * 0.9
    return x


def fits(fmt, dtype):
    try:
        check_dtype(parse_format(fmt), dtype)
    except ValueError:
        return False
    return True


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("fmt", "dtype"), [(fmt, dtype) for fmt in FORMATS for dtype in DTYPES if fits(fmt, dtype)])
def test_decoding_in_place_has_the_bits_of_decode(fmt, dtype):
    """Invariant: decode_into_(empty, e) == decode(e), signs of zeros included, in every dtype wide enough."""
    for shape in ((6, 70), (5, 33, 1), (0, 3), (2, 3, 4, 4), (1, 1)):
        encoded = encode(awkward_values(shape, dtype), fmt)
        wanted = decode(encoded, dtype)
        target = torch.full(shape, math.nan, dtype=dtype)
        decode_into_(target, encoded)
        assert torch.equal(target, wanted)
        assert torch.equal(target.signbit(), wanted.signbit())


def test_decoding_in_place_keeps_the_memory_format():
    """A channels-last parameter stays channels-last, and its values are right."""
    encoded = encode(torch.randn(3, 4, 5, 5), "bfp8")
    target = torch.empty(3, 4, 5, 5).to(memory_format=torch.channels_last)
    decode_into_(target, encoded)
    assert target.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(target, decode(encoded))


@pytest.mark.parametrize("fmt", [*FORMATS, None])
def test_a_sample_loads_with_its_bits(place, fmt):
    """Invariant: load_into restores every parameter and persistent buffer, whatever the format."""
    formats = {"conv.weight": fmt, "norm.bias": None, "fc.weight": fmt} if fmt == "bfp8-dim1" else fmt
    if fmt == "bfp8-dim1":  # 1-D parameters have no dim 1
        net = fill(Net(), 0, None)
        with torch.no_grad():
            net.conv.weight.copy_(quantize(net.conv.weight, fmt, rounding="nearest"))
            net.fc.weight.copy_(quantize(net.fc.weight, fmt, rounding="nearest"))
    else:
        net = fill(Net(), 0, fmt)
    bank, wanted = SampleBank(place), contents(net)
    bank.add(net, step=0, formats=formats)
    fill(net, 5, None)
    reopened(bank).load_into(net, 0)
    assert all(torch.equal(contents(net)[name], wanted[name]) for name in wanted)


def test_many_samples_and_their_metadata(place):
    bank = filled_bank(place, (10, 20, 30))
    bank.add(fill(Net(), 40), step=40, cycle=2, chain=3, formats="bfp8", metrics={"x": math.nan, "y": -math.inf})
    bank = reopened(bank)
    assert_holds(bank, (10, 20, 30, 40))
    assert bank.infos[0] == SampleInfo(10, None, 0, 1.0, 0.1, {"loss": 1.25})
    last = bank[-1]
    assert (last.step, last.cycle, last.chain) == (40, 2, 3)
    assert math.isnan(last.info.metrics["x"])
    assert last.info.metrics["y"] == -math.inf
    assert [sample.step for sample in bank] == bank.steps
    assert bank.chains == [0, 3]


def test_state_dict_of_a_sample_loads_the_usual_way():
    """Sample.state_dict() has the keys of the module's and satisfies a strict load."""
    bank = filled_bank(None, (1,))
    net = fill(Net(), 9)
    net.load_state_dict(bank[0].state_dict(), strict=True)
    assert all(torch.equal(contents(net)[name], value) for name, value in expected(1).items())


def test_loading_is_in_place():
    """Optimizers, hooks and gradients keep the tensors they know."""
    bank, net = filled_bank(None, (1,)), Net()
    before = {name: (id(t), t.data_ptr()) for name, t in module_tensors(net).items()}
    net.fc.weight.requires_grad_(False)
    net.conv.weight.grad = torch.ones_like(net.conv.weight)
    bank.load_into(net, 0)
    assert {name: (id(t), t.data_ptr()) for name, t in module_tensors(net).items()} == before
    assert not net.fc.weight.requires_grad
    assert bool((net.conv.weight.grad == 1).all())


def test_a_sample_does_not_change_with_the_module():
    """Stored tensors are copies, also those that are kept as they are."""
    net, bank = fill(Net(), 1, None), SampleBank()
    bank.add(net, step=1)
    fill(net, 2, None)
    bank.load_into(net, 0)
    assert all(torch.equal(contents(net)[name], value) for name, value in expected(1, None).items())


def test_tied_weights_are_stored_once():
    tied = filled_bank(None, (1,))
    assert "tied.weight" not in tied[0].entries
    assert tied.spec.aliases == (("tied.weight", "fc.weight"),)
    untied = Net()
    untied.tied.weight = nn.Parameter(untied.tied.weight.detach().clone())
    tied.load_into(untied, 0)  # two tensors, one stored: both get it
    assert torch.equal(untied.tied.weight, untied.fc.weight)
    other = SampleBank()
    other.add(untied, step=0, formats="bfp8")
    with pytest.raises(BankError, match=r"`tied\.weight` is tied to `fc\.weight` in the module, but not in the sample"):
        other.load_into(Net(), 0)


def test_a_state_dict_with_tied_weights_is_recognized():
    bank = SampleBank()
    bank.add(Net().state_dict(), step=0)
    assert bank.spec.aliases == (("tied.weight", "fc.weight"),)


def test_compiled_modules_have_the_names_of_plain_ones():
    net, compiled = nn.Sequential(nn.Linear(2, 2)), nn.Module()
    compiled._orig_mod = net  # what torch.compile returns, without the seconds that its import takes
    assert list(module_tensors(compiled)) == list(net.state_dict())
    assert list(module_tensors(nn.Sequential(compiled))) == ["0." + name for name in net.state_dict()]
    assert list(module_tensors(Net())) == list(Net().state_dict())


@pytest.mark.parametrize("value", [0.3, 1e-9, 5.0, math.inf])
def test_a_value_off_the_grid_is_refused_by_name(place, value):
    bank = filled_bank(place, (1,))
    net = fill(Net(), 2)
    with torch.no_grad():
        net.fc.weight[1, 2], net.fc.weight[1, 0] = value, 2.0 if value != 5.0 else 2.0**-9
    with pytest.raises(BankError, match=r"`fc.weight` is not on the grid of bfp8: element \[1, \d\]"):
        bank.add(net, step=2, formats="bfp8")
    assert_holds(reopened(bank), (1,))


def test_nan_in_a_parameter_is_refused_by_name():
    net = fill(Net(), 2)
    net.norm.weight.data[0] = math.nan
    with pytest.raises(BankError, match=r"`norm\.weight` cannot be stored: .*NaN"):
        SampleBank().add(net, step=2, formats="bfp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.register_buffer("extra", torch.zeros(1)), "only it has .*extra"),
        (lambda net: delattr(net, "labels"), "it lacks .*labels"),
        (lambda net: setattr(net, "fc", nn.Linear(4, 5)), "`fc.weight` is .5, 4. torch.float32 in the module"),
        (lambda net: net.double(), "torch.float64 in the module, but the sample has `conv.weight`.* float32 on bfp8"),
    ],
)
def test_another_module_is_refused_and_left_alone(change, message):
    bank, net = filled_bank(None, (1,)), fill(Net(), 7)
    change(net)
    before = contents(net)
    with pytest.raises(BankError, match=message):
        bank.load_into(net, 0)
    assert all(torch.equal(value, contents(net)[name]) for name, value in before.items())


@pytest.mark.parametrize("formats", ["fixed8.6", None, {"fc.weight": "bfp8"}])
def test_other_formats_are_not_mixed_in(place, formats):
    bank = filled_bank(place, (1,))
    net = fill(Net(), 2, "fixed8.6" if formats == "fixed8.6" else "bfp8")
    with pytest.raises(BankError, match=r"another module or of other formats: `conv\.weight`.* on bfp8 against"):
        bank.add(net, step=2, formats=formats)
    assert_holds(reopened(bank), (1,))


def test_other_modules_are_not_mixed_in():
    bank = filled_bank(None, (1,))
    with pytest.raises(BankError, match="another module"):
        bank.add(nn.Linear(2, 2), step=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.add(Net(), step=-1), "`step` of a sample must be an int"),
        (lambda b: b.add(Net(), step=True), "`step`"),
        (lambda b: b.add(Net(), step=1, chain="a"), "`chain`"),
        (lambda b: b.add(Net(), step=1, lr=math.nan), "`lr` of a sample must be finite"),
        (lambda b: b.add(Net(), step=1, metrics={"x": "y"}), "`metrics.*must be a number"),
        (lambda b: b.add(Net(), step=1, formats={"nope": "bfp8"}), "names tensors that the module does not have: nope"),
        (lambda b: b.add(Net(), step=1, formats={"labels": "bfp8"}), "`labels`.* cannot be stored"),
        (lambda b: b.add(Net(), step=1, formats={"fc.bias": "bfp8-dim1"}), "`fc.bias`.* cannot be stored"),
        (lambda b: b.add({"x": torch.zeros(2)}, step=1, formats="bfp8"), "pass a mapping of names"),
        (lambda b: b.add(nn.LazyLinear(2), step=1), "not initialized yet"),
        (lambda b: b.add({"x": torch.zeros(2).to_sparse()}, step=1), "plain dense tensors"),
        (lambda b: b.add({"x": torch.zeros(2, dtype=torch.complex64)}, step=1), "dtype torch.complex64"),
        (lambda b: SampleBank(capacity=0), "`capacity`"),
        (lambda b: SampleBank(policy="first"), "`policy`"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(BankError, match=message):
        call(SampleBank())


def test_there_is_no_sample_beyond_the_last():
    bank = filled_bank(None, (1,))
    with pytest.raises(IndexError):
        bank.load_into(Net(), 1)


def test_checkpoint_of_a_bank_in_memory():
    """state_dict survives torch.save and torch.load(weights_only=True), and is the whole bank."""
    bank, buffer = filled_bank(None, (1, 2), capacity=5, policy="reservoir", seed=4), io.BytesIO()
    torch.save(bank.state_dict(), buffer)
    buffer.seek(0)
    other = SampleBank(capacity=5, policy="reservoir", seed=4)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_holds(other, (1, 2))
    other.add(fill(Net(), 3), step=3, formats="bfp8")
    assert_holds(other, (1, 2, 3))
    assert_holds(bank, (1, 2))
    with pytest.raises(BankError, match="capacity, policy, seed"):
        SampleBank().load_state_dict(bank.state_dict())


def test_resnet18_takes_a_quarter(tmp_path):
    """Invariant: at most 0.27 of a float32 state_dict, in memory and on disk, headers and manifest included."""
    resnet = pytest.importorskip("torchvision").models.resnet18(num_classes=10)
    with torch.no_grad():
        for param in resnet.parameters():
            param.copy_(quantize(param, "bfp8", rounding="nearest"))
    bank = SampleBank(tmp_path / "bank")
    bank.add(resnet, step=1, formats="bfp8")
    whole = sum(t.nbytes for t in resnet.state_dict().values())
    assert bank.nbytes_fp32 == whole
    assert bank.nbytes <= 0.27 * whole
    assert sum(tensor.nbytes for tensor in bank[0].tensors.values()) == bank.nbytes
    assert sum(file.stat().st_size for file in (tmp_path / "bank").iterdir()) <= 0.27 * whole


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda net: nn.Parameter(net.fc.weight[:1].detach().expand(4, 4)), r"`fc\.weight` is expanded.*\.clone\(\)"),
        (lambda net: nn.Parameter(net.fc.weight.detach().to("meta")), r"`fc\.weight` is on the meta device.*to_empty"),
    ],
)
def test_a_module_that_cannot_take_a_sample_is_left_alone(spoil, message):
    """Not written halfway, and not passed over in silence."""
    bank, net = filled_bank(None, (1,)), fill(Net(), 7)
    net.fc.weight = net.tied.weight = spoil(net)
    before = {name: value for name, value in contents(net).items() if not value.is_meta}
    with pytest.raises(BankError, match=message):
        bank.load_into(net, 0)
    assert all(torch.equal(value, contents(net)[name]) for name, value in before.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv.weight", "norm.bias", "norm.running_var"])
def test_a_sample_that_is_not_finite_is_refused_by_name(place, name, value):
    bank, net = filled_bank(place, (1,)), fill(Net(), 2, None)
    dict(net.state_dict())[name].view(-1)[0] = value
    with pytest.raises(BankError, match=rf"`{re.escape(name)}` cannot be stored: .* NaN and .* infinite"):
        SampleBank().add(net, step=2)
    assert_holds(reopened(bank), (1,))


def test_a_mask_of_infinities_is_stored():
    """Attention masks are buffers of zeros and minus infinity: no fault of the network."""
    module = nn.Module()
    module.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    bank = SampleBank()
    bank.add(module, step=0)
    assert torch.equal(bank[0].state_dict()["mask"], module.mask)
    module.mask[0, 0] = math.nan
    with pytest.raises(BankError, match="`mask` cannot be stored"):
        bank.add(module, step=1)
