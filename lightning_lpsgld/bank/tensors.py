"""The tensors of a sample as bytes: a safetensors file that describes itself, and the checks on the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from lightning_lpsgld.bank.base import Base
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.sample import SampleInfo
from lightning_lpsgld.bank.spec import EntrySpec, ModuleSpec
from lightning_lpsgld.formats.packing import check_packed
from lightning_lpsgld.ops.packing import pack, unpack

__all__ = [
    "base_bytes",
    "check_base_tensors",
    "check_codes",
    "check_tensors",
    "described_base",
    "packed",
    "parse_base",
    "parse_sample",
    "sample_bytes",
    "unpacked",
]


def check_tensors(tensors: Mapping[str, Tensor], spec: ModuleSpec, where: str, base: Base | None = None) -> None:
    """Raise :class:`BankError` unless ``tensors`` are what a sample of ``spec`` consists of.

    Args:
        tensors: By key.
        spec: The module's description.
        where: For the message.
        base: Entries that it has may be absent.
    """
    own = [entry for entry in spec.entries if base is None or _is_own(entry, tensors, base)]
    wanted = spec.stored if len(own) == len(spec.entries) else {k: v for entry in own for k, v in entry.stored.items()}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != wanted:
        names = sorted(set(found) ^ set(wanted)) or [n for n in wanted if found[n] != wanted[n]]
        raise BankError(f"{where} does not hold the tensors of this bank's module: `{names[0]}` differs.")
    for entry in own:
        check_codes(tensors, entry, where)


def _is_own(entry: EntrySpec, tensors: Mapping[str, Tensor], base: Base) -> bool:
    return entry.name not in base.digests or any(key in tensors for key in entry.stored)


def check_codes(tensors: Mapping[str, Tensor], entry: EntrySpec, where: str) -> None:
    """Raise :class:`BankError` if a code or exponent is none of the entry's format."""
    fmt = entry.format
    if fmt is None or entry.numel == 0:
        return
    _check_range(tensors[f"codes.{entry.name}"], fmt.code_range, f"{where}: the codes of {entry}")
    if fmt.blocks.shared:
        allowed = fmt.exponent_range(entry.dtype)
        _check_range(tensors[f"exponents.{entry.name}"], allowed, f"{where}: the exponents of {entry}")


def _check_range(values: Tensor, allowed: tuple[int, int], what: str) -> None:
    if not values.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(values))
    if low < allowed[0] or high > allowed[1]:
        raise BankError(f"{what} lie between {low} and {high}; the format has {allowed[0]} to {allowed[1]}.")


def packed(tensors: Mapping[str, Tensor], spec: ModuleSpec) -> dict[str, Tensor]:
    """The tensors of a sample with codes of fewer than 8 bits side by side, under ``packed.<name>``."""
    bits = {f"codes.{entry.name}": entry.packed_bits for entry in spec.entries if entry.packed_bits}
    return {
        f"packed.{key.removeprefix('codes.')}" if key in bits else key: pack(x, bits[key]) if key in bits else x
        for key, x in tensors.items()
    }


def unpacked(tensors: Mapping[str, Tensor], spec: ModuleSpec, where: str) -> dict[str, Tensor]:
    """Inverse of :func:`packed`; codes that are not packed stay, as in files of earlier versions.

    Raises:
        BankError: If a packed tensor is not what codes of its entry take, or the codes are there twice.
    """
    entries = {f"packed.{entry.name}": entry for entry in spec.entries if entry.packed_bits}
    found: dict[str, Tensor] = {}
    for key, x in tensors.items():
        entry = entries.get(key)
        if entry is None:
            found[key] = x
            continue
        assert entry.format is not None
        if f"codes.{entry.name}" in tensors:
            raise BankError(f"{where} has the codes of {entry} twice, packed and not.")
        try:
            check_packed(x, entry.packed_bits, entry.numel)
        except ValueError as error:
            raise BankError(f"{where}: the codes of {entry}: {error}") from error
        signed = entry.format.code_range[0] < 0
        found[f"codes.{entry.name}"] = unpack(x, entry.packed_bits, entry.shape, signed=signed)
    return found


def sample_bytes(info: SampleInfo, spec: ModuleSpec, tensors: Mapping[str, Tensor], base: Base | None = None) -> bytes:
    """Content of a sample's file; equal samples are equal bytes.

    It describes itself; one that leaves out tensors of ``base`` names the file of the base, which describes the module.
    """
    whole = base is None or base.file is None or len(tensors) == len(spec.stored)
    about = {"version": "1", "module": spec.text} if whole or base is None else {"version": "2", "base": str(base.file)}
    header = {"format": "lightning_lpsgld.sample", "info": json.dumps(info.to_json()), **about}
    return _sorted_header(safetensors.torch.save(packed(tensors, spec), header))


def base_bytes(base: Base, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> bytes:
    """Content of the file of a base: its tensors, unless it is a reference, and what module they are of."""
    header = {
        "format": "lightning_lpsgld.base", "version": "1", "kind": base.kind, "module": spec.text,
        "digests": json.dumps(dict(base.digests), sort_keys=True),
    }  # fmt: skip
    return _sorted_header(safetensors.torch.save(packed(tensors, spec) if base.kind == "stored" else {}, header))


def described_base(metadata: Mapping[str, str], file: str, size: int) -> tuple[Base, ModuleSpec]:
    """What the metadata in the file of a base say.

    Raises:
        BankError: If they are malformed.
    """
    try:
        spec, digests = ModuleSpec.from_json(json.loads(metadata["module"])), json.loads(metadata["digests"])
        base = Base.from_json({"kind": metadata["kind"], "file": file, "size": size, "digests": digests}, spec)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BankError(f"{file} does not describe itself: {error}") from error
    return base, spec


def parse_base(data: bytes, spec: ModuleSpec, base: Base) -> dict[str, Tensor]:
    """Tensors of the content of a base's file.

    Raises:
        BankError: If they are not those of ``base``.
    """
    tensors = unpacked(_loaded(data, str(base.file)), spec, str(base.file))
    check_base_tensors(tensors, spec, base, str(base.file))
    return tensors


def check_base_tensors(tensors: Mapping[str, Tensor], spec: ModuleSpec, base: Base, where: str) -> None:
    """Raise :class:`BankError` unless ``tensors`` are those of ``base``."""
    entries = [entry for entry in spec.entries if entry.name in base.digests]
    check_tensors(tensors, ModuleSpec(tuple(entries)), where)
    wrong = [entry.name for entry in entries if not base.holds(entry, tensors)]
    if wrong:
        raise BankError(f"{where} was altered: the checksum of `{wrong[0]}` does not match.")


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


def parse_sample(data: bytes, spec: ModuleSpec, where: str, base: Base | None = None) -> dict[str, Tensor]:
    """Tensors of a sample file's content; those that ``base`` has may be absent.

    Raises:
        BankError: If it is not a safetensors file of exactly the tensors of ``spec``, or a code is none of its format.
    """
    tensors = unpacked(_loaded(data, where), spec, where)
    check_tensors(tensors, spec, where, base)
    return tensors


def _loaded(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # what a parser raises on foreign bytes is not ours to list
        raise BankError(f"{where} is not a readable safetensors file: {str(error)[:200]}.") from error
