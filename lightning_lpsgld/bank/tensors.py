"""The tensors of a sample as bytes: a safetensors file that describes itself, and the checks on the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.sample import SampleInfo
from lightning_lpsgld.bank.spec import EntrySpec, ModuleSpec
from lightning_lpsgld.formats import (
    BlockFloatingPoint,
    FixedPoint,
    MicroscalingFloat,
    block_exponent_range,
    code_dtype,
    scale_exponent_range,
)

__all__ = ["check_codes", "check_tensors", "parse_sample", "sample_bytes"]


def check_tensors(tensors: Mapping[str, Tensor], spec: ModuleSpec, where: str) -> None:
    """Raise :class:`BankError` unless ``tensors`` are what a sample of ``spec`` consists of."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != spec.stored:
        names = sorted(set(found) ^ set(spec.stored)) or [n for n in spec.stored if found[n] != spec.stored[n]]
        raise BankError(f"{where} does not hold the tensors of this bank's module: `{names[0]}` differs.")
    for entry in spec.entries:
        check_codes(tensors, entry, where)


def check_codes(tensors: Mapping[str, Tensor], entry: EntrySpec, where: str) -> None:
    """Raise :class:`BankError` if a code or exponent is none of the entry's format."""
    if entry.format is None or entry.numel == 0:
        return
    _check_range(tensors[f"codes.{entry.name}"], _code_range(entry), f"{where}: the codes of {entry}")
    if isinstance(entry.format, (BlockFloatingPoint, MicroscalingFloat)):
        fits = block_exponent_range if isinstance(entry.format, BlockFloatingPoint) else scale_exponent_range
        allowed = fits(entry.format, entry.dtype)  # type: ignore[arg-type]
        _check_range(tensors[f"exponents.{entry.name}"], allowed, f"{where}: the exponents of {entry}")


def _code_range(entry: EntrySpec) -> tuple[int, int]:
    fmt = entry.format
    assert fmt is not None
    if isinstance(fmt, (FixedPoint, BlockFloatingPoint)):
        return fmt.code_min, fmt.code_max
    width = torch.iinfo(code_dtype(fmt)).bits  # bit patterns; those that fill the integer wrap around
    return (0, 2**fmt.bits - 1) if fmt.bits < width else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)


def _check_range(values: Tensor, allowed: tuple[int, int], what: str) -> None:
    if not values.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(values))
    if low < allowed[0] or high > allowed[1]:
        raise BankError(f"{what} lie between {low} and {high}; the format has {allowed[0]} to {allowed[1]}.")


def sample_bytes(info: SampleInfo, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> bytes:
    """Content of a sample's file; equal samples are equal bytes."""
    header = {"format": "lightning_lpsgld.sample", "version": "1", "info": json.dumps(info.to_json())}
    return _sorted_header(safetensors.torch.save(dict(tensors), {**header, "module": spec.text}))


def _sorted_header(data: bytes) -> bytes:
    """The same file with its metadata in order: safetensors writes them in one that changes from process to process.

    Then equal samples are equal files with equal names, and a resumed run leaves the bytes of an uninterrupted one.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def parse_sample(data: bytes, spec: ModuleSpec, where: str) -> dict[str, Tensor]:
    """Tensors of a sample file's content.

    Raises:
        BankError: If it is not a safetensors file of exactly the tensors of ``spec``, or a code is none of its format.
    """
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # what a parser raises on foreign bytes is not ours to list
        raise BankError(f"{where} is not a readable safetensors file: {str(error)[:200]}.") from error
    check_tensors(tensors, spec, where)
    return tensors
