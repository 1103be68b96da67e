"""Codes of fewer than eight bits lie side by side in files, in memory and in checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lpsgld import SampleBank
from lightning_lpsgld.bank import memory, tensors
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.formats.packing import check_packed, packed_codes, packed_size, unpacked_codes
from lightning_lpsgld.ops import quantize

FORMATS = ["bfp4", "fixed4.2", "bfp6", "fixed5.3", "mxfp4", "mxfp6e3m2", "mxfp6e2m3", "bfp7", "bfp3", "fixed2.1"]


def on_grid(fmt: str) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 5, bias=False))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(quantize(p * 3, fmt, rounding="nearest"))
    return module


def same(module: nn.Module, bank: SampleBank) -> bool:
    other = copy.deepcopy(module)
    for p in other.parameters():
        nn.init.zeros_(p)
    bank.load_into(other, -1)
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 7), signed=st.booleans(), count=st.integers(0, 70), seed=st.integers(0, 10**6))
def test_any_codes_come_back(bits, signed, count, seed):
    low = -(2 ** (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, low + 2**bits, (count,), generator=generator).to(torch.int8)
    packed = packed_codes(codes, bits)
    assert packed.nbytes == packed_size(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpacked_codes(packed, bits, (count,), signed=signed), codes)
    whole = sum((int(code) % 2**bits) << (bits * i) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == whole.to_bytes(packed.nbytes, "little")


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_sample_takes_its_bits_and_has_its_values(fmt, tmp_path):
    module, bits = on_grid(fmt), parse_format(fmt).bits
    numel = sum(p.numel() for p in module.parameters())
    for bank in (SampleBank(), SampleBank(tmp_path / "bank")):
        bank.add(module, step=1, formats=fmt)
        assert same(module, bank)
        exponents = sum(parse_format(fmt).blocks.count(tuple(p.shape)) for p in module.parameters())
        assert bank.nbytes <= numel * bits / 8 + exponents + 3  # three tensors, whole bytes each
    assert same(module, SampleBank.open(tmp_path / "bank"))
    (file,) = (tmp_path / "bank").glob("sample-*.safetensors")
    assert file.stat().st_size < numel * bits / 8 + exponents + 4000  # the header


def test_a_checkpoint_holds_packed_codes_and_takes_those_of_before(monkeypatch):
    module = on_grid("bfp4")
    bank, old = SampleBank(), SampleBank()
    bank.add(module, step=1, formats="bfp4")
    monkeypatch.setattr(memory, "packed", lambda found, spec: dict(found))
    old.add(module, step=1, formats="bfp4")
    monkeypatch.undo()
    sizes = []
    for state in (bank.state_dict(), old.state_dict()):
        sizes.append(sum(x.nbytes for x in state["samples"][0].values()))
        again = SampleBank()
        again.load_state_dict(copy.deepcopy(state))
        assert same(module, again)
    assert sizes[0] < 0.6 * sizes[1]


def test_a_bank_of_unpacked_codes_opens_and_goes_on(tmp_path, monkeypatch):
    module, path = on_grid("bfp4"), tmp_path / "bank"
    with monkeypatch.context() as before:
        before.setattr(tensors, "packed", lambda found, spec: dict(found))
        SampleBank(path).add(module, step=1, formats="bfp4")
    bank = SampleBank.open(path)
    assert same(module, bank)
    bank.add(module, step=2, formats="bfp4")
    assert same(module, SampleBank.open(path))
    sizes = sorted(file.stat().st_size for file in path.glob("sample-*.safetensors"))
    assert sizes[0] < 0.7 * sizes[1]


def altered(path: Path, change: Callable) -> None:
    """A bank whose only sample has other packed tensors, under a name and a manifest that fit."""
    real = tensors.packed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "packed", lambda found, spec: change(real(found, spec)))
        SampleBank(path).add(on_grid("bfp4"), step=1, formats="bfp4")


def longer(found):
    key = next(k for k in found if k.startswith("packed."))
    return {**found, key: torch.cat([found[key], torch.zeros(1, dtype=torch.uint8)])}


def twice(found):
    key = next(k for k in found if k.startswith("packed.0.bias"))
    return {**found, "codes.0.bias": torch.zeros(64, dtype=torch.int8), key: found[key]}


def beyond(found):
    key = next(k for k in found if k.startswith("packed.0.bias"))
    return {**found, key: torch.full_like(found[key], 0x88)}  # -8, which bfp4 does not have


@pytest.mark.parametrize(
    ("change", "words"), [(longer, "codes of 4 bits are"), (twice, "twice"), (beyond, "lie between -8 and -8")]
)
def test_wrong_packed_tensors_are_refused(change, words, tmp_path):
    altered(tmp_path / "bank", change)
    bank = SampleBank.open(tmp_path / "bank")
    with pytest.raises(BankError, match=words):
        bank.load_into(on_grid("bfp4"), -1)


def test_bits_after_the_last_code_are_refused():
    packed = packed_codes(torch.tensor([1, 2, 3], dtype=torch.int8), 4)
    packed[-1] |= 0x10
    with pytest.raises(ValueError, match="after the last"):
        check_packed(packed, 4, 3)
