"""Codes of fewer than 8 bits take their bits: the kernel packs as the definition, and weights are held and saved so."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.formats.packing import check_packed, packed_codes, packed_size, unpacked_codes
from lightning_lpsgld.ops import CodedTensor, code_parameters_, cpu, decode, encode, quantize
from lightning_lpsgld.ops.coded import coded_tensor, plain
from lightning_lpsgld.ops.packing import pack, unpack
from lightning_lpsgld.ops.stored import StoredCodes

#: One or two of each number of bits and each family.
FORMATS = (
    "bfp4", "bfp6", "bfp4-tensor", "bfp5b4", "bfp7", "bfp3", "fixed2.1", "fixed4.2", "fixed6.4", "e2m1", "e3m2",
    "mxfp4", "mxfp6e3m2",
)  # fmt: skip
#: Rows of 35, 40, 1 and 27 elements; of 7 rows of 5 codes of 3 bits only one begins at a byte.
SHAPES = ((7, 5), (6, 5, 7), (9, 40), (16, 1), (4, 3, 3, 3), (13,), (), (0, 4), (3, 0))


def made(fmt, shape, memory_format=torch.contiguous_format):
    values = torch.randn(shape, generator=torch.manual_seed(0)).contiguous(memory_format=memory_format)
    return quantize(values, fmt, rounding="nearest"), CodedTensor.of(values, fmt)


def same_bits(a, b):
    a, b = plain(a), plain(b)
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 7), signed=st.booleans(), count=st.integers(0, 300), seed=st.integers(0, 10**6))
def test_the_kernel_packs_as_the_definition(bits, signed, count, seed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, (count,), generator=torch.manual_seed(seed)).to(torch.int8)
    packed = pack(codes, bits)
    assert torch.equal(packed, packed_codes(codes, bits))
    check_packed(packed, bits, count)
    assert torch.equal(unpack(packed, bits, (count,), signed=signed), codes)
    assert torch.equal(unpacked_codes(packed, bits, (count,), signed=signed), codes)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_pieces_of_several_threads_fit_together(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (200_003,)).to(torch.int8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            packed = pack(codes, bits)
            assert torch.equal(packed, packed_codes(codes, bits))
            assert torch.equal(unpack(packed, bits, (200_003,), signed=True), codes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_weight_takes_its_bits_and_has_its_values(fmt):
    """Resident bytes: the storage of the codes is ``ceil(n * bits / 8)`` bytes, whatever the shape."""
    number = parse_format(fmt)
    for shape in SHAPES:
        if shape == (3, 0) and fmt == "bfp4-tensor":
            continue
        values, weight = made(fmt, shape)
        count = torch.Size(shape).numel()
        assert weight.untyped_storage().nbytes() == -(-count * number.bits // 8) == packed_size(count, number.bits)
        assert weight.nbytes_stored == number.stored_bytes(shape)
        assert same_bits(weight, values), shape
        assert torch.equal(weight.decoded().double(), decode(encode(values, fmt), torch.float64))
        assert torch.equal(plain(weight.double()), values.double())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("fmt", ["bfp4", "e2m1", "mxfp6e3m2", "bfp7b3"])
def test_every_backend_opens_them(backend, fmt):
    encoded = encode(torch.randn(31, 96), fmt)
    stored = StoredCodes.of(encoded)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(stored.decoded(dtype, backend=backend), decode(encoded, dtype, backend="reference"))
    assert torch.equal(stored.encoded().codes, encoded.codes)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the built CPU kernels")
def test_codes_are_opened_as_they_are_decoded(monkeypatch):
    """No tensor of a byte a code is made on the way, where the kernel knows the format."""
    opened = []
    monkeypatch.setattr(StoredCodes, "unpacked", lambda self, *, signed: opened.append(self.shape))
    for fmt in ("bfp4", "fixed6.4", "e3m2", "mxfp4", "bfp4-tensor"):
        values, weight = made(fmt, (64, 96))
        assert same_bits(weight, values)
    assert not opened


@pytest.mark.parametrize("fmt", ["bfp3", "bfp4", "fixed5.3", "bfp6", "mxfp4"])
def test_views_over_bytes_that_rows_share(fmt):
    values, weight = made(fmt, (11, 5))
    for view in (
        lambda x: x[3:4], lambda x: x[1:9:3], lambda x: x[:, 2], lambda x: x.t()[1:3], lambda x: x.flatten()[7:31],
        lambda x: x[10], lambda x: x.unsqueeze(0).expand(2, 11, 5), lambda x: x.split([4, 7])[1], lambda x: x[11:],
    ):  # fmt: skip
        assert isinstance(view(weight), CodedTensor)
        assert same_bits(view(weight), view(values))


@pytest.mark.parametrize("dim", [1, 5, 8, 20])
@pytest.mark.parametrize("fmt", ["bfp3", "bfp4", "bfp6", "e2m1", "mxfp4"])
def test_an_embedding_opens_the_rows_that_it_looks_up(fmt, dim, monkeypatch):
    values, weight = made(fmt, (23, dim))
    places = torch.tensor([[22, 0, 7], [7, 1, 21]])
    sizes = []
    monkeypatch.setattr(CodedTensor, "decoded", lambda self: sizes.append(self.shape))
    found = nn.functional.embedding(places, weight)
    assert same_bits(found, values[places])
    assert not sizes, "the weight was decoded"
    for wrong in (23, -1):
        with pytest.raises((IndexError, RuntimeError)):
            nn.functional.embedding(torch.tensor([wrong]), weight)


def test_channels_last_memory_is_packed_in_its_order():
    values, weight = made("bfp4", (5, 3, 3, 2), torch.channels_last)
    assert weight.stride() == values.stride()
    assert weight.untyped_storage().nbytes() == 45
    assert same_bits(weight, values)
    assert same_bits(weight[1:3, :, 1:], values[1:3, :, 1:])
    weight.copy_(made("bfp4", (5, 3, 3, 2))[1])  # row-major codes
    assert same_bits(weight, made("bfp4", (5, 3, 3, 2))[0])


@pytest.mark.parametrize("fmt", ["bfp3", "fixed6.4", "mxfp4", "e2m1"])
def test_rows_are_moved_by_themselves(fmt, monkeypatch):
    monkeypatch.setattr("lightning_lpsgld.ops.code_cell._RUN", 64)
    values, weight = made(fmt, (37, 5))
    runs = weight.cell.runs()
    assert [start for start, _ in runs] == [stop for _, stop in [(0, 0), *runs[:-1]]]
    assert runs[-1][1] == 37
    assert len(runs) > 3
    for start, stop in runs[1::2]:
        weight.cell.set(-values[start:stop], start, stop)
        values[start:stop] = quantize(-values[start:stop], fmt, rounding="nearest")
    assert same_bits(weight, values)


@pytest.mark.parametrize("fmt", FORMATS)
def test_copies_and_files_have_the_bits(fmt):
    values, weight = made(fmt, (65, 63))
    file = io.BytesIO()
    torch.save(nn.Parameter(weight), file)
    assert file.tell() < weight.nbytes_stored + 3000
    file.seek(0)
    back = torch.load(file, weights_only=True)
    assert isinstance(back, nn.Parameter)
    for twin in (back, weight.clone(), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert isinstance(twin, CodedTensor)
        assert twin.nbytes_stored == weight.nbytes_stored
        assert same_bits(twin.detach(), values)


class _Earlier:
    """Pickled as versions before codes were packed did: a byte a code, in the shape of the weight."""

    def __init__(self, encoded):
        self.encoded = encoded

    def __reduce__(self):
        facts = (str(self.encoded.format), torch.float32, True, True)
        return coded_tensor, (self.encoded.codes, self.encoded.exponents, *facts)


@pytest.mark.parametrize("fmt", ["bfp4", "e2m1", "mxfp6e2m3"])
def test_a_file_of_codes_of_a_byte_each_is_read_and_packed(fmt):
    values = quantize(torch.randn(33, 32), fmt, rounding="nearest")
    file = io.BytesIO()
    torch.save({"weight": _Earlier(encode(values, fmt))}, file)
    file.seek(0)
    weight = torch.load(file, weights_only=True)["weight"]
    assert weight.untyped_storage().nbytes() == packed_size(33 * 32, weight.format.bits)
    assert same_bits(weight.detach(), values)


def test_packed_codes_that_are_none_are_refused():
    stored = made("bfp4", (5, 3))[1].stored()
    facts = (stored.exponents, "bfp4", torch.float32, False, False)
    assert same_bits(coded_tensor(stored.codes, *facts, (5, 3), (3, 1)), made("bfp4", (5, 3))[0])
    for codes, shape, stride, words in (
        (stored.codes[:-1], (5, 3), (3, 1), "15 codes of 4 bits are 8 bytes"),
        (stored.codes | 128, (5, 3), (3, 1), "bits after the last of 15"),
        (stored.codes, (5, 3), (1, 1), "dense memory"),
    ):
        with pytest.raises(ValueError, match=words):
            coded_tensor(codes, *facts, shape, stride)


def test_a_network_of_four_bits_takes_half_of_one_of_eight():
    """Counted by the storages that are alive, against the bytes that the formats say."""
    networks = {fmt: code_parameters_(nn.Sequential(nn.Linear(256, 300), nn.Linear(300, 7)), fmt) for fmt in
                ("fixed8.6", "fixed4.2", "fixed6.4")}  # fmt: skip
    held = {fmt: sum(p.untyped_storage().nbytes() for p in net.parameters()) for fmt, net in networks.items()}
    count = [256 * 300, 300, 300 * 7, 7]
    assert held["fixed8.6"] == sum(count)
    assert held["fixed4.2"] == sum(-(-n // 2) for n in count)
    assert held["fixed6.4"] == sum(-(-n * 3 // 4) for n in count)
