"""Samples that are found without a table of contents: each file describes itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from lightning_lpsgld.bank.base import Base, base_checksum
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.folder import Folder
from lightning_lpsgld.bank.manifest import MANIFEST, check_json_size
from lightning_lpsgld.bank.records import Record, check_size, checksum, parse_sample_name, sizes_of
from lightning_lpsgld.bank.spec import ModuleSpec
from lightning_lpsgld.bank.tensors import described_base, parse_base, parse_sample

__all__ = ["Found", "check_vacant", "has_samples", "intact_samples", "most_common_base"]

#: Longest header of a safetensors file that is looked at; those of a million tensors fit.
_MAX_HEADER = 2**28


class Found(NamedTuple):
    """An intact sample: its line, the module it is of, and the base it takes tensors from, if it does."""

    record: Record
    spec: ModuleSpec
    base: Base | None


def has_samples(folder: Folder) -> bool:
    """Whether files of samples are in a folder, listed or not; not if there is no folder."""
    return folder.there() and any(parse_sample_name(name) is not None for name in folder.names())


def check_vacant(folder: Folder) -> None:
    """Refuse a place for a new bank that has one already, or what is left of one.

    Raises:
        BankError: If there is a bank, or samples without a manifest.
    """
    if folder.exists(MANIFEST):
        raise BankError(
            f"A bank is at {folder.location} already. Use `SampleBank.open`, `exist_ok=True`, or another path."
        )
    if has_samples(folder):
        raise BankError(f"{folder.location} has samples but no {MANIFEST}. `SampleBank.recover` rebuilds it.")


def most_common_base(found: Collection[Found]) -> Base | None:
    """The base that most of the samples take tensors from; ``None`` if none does."""
    counts = Counter(one.base.file for one in found if one.base is not None)
    return next((one.base for one in found if one.base and one.base.file == max(counts, key=counts.__getitem__)), None)


def intact_samples(folder: Folder, names: Iterable[str]) -> Iterator[Found]:
    """Intact samples among ``names``; damaged files and others are passed over.

    No more of a file is read than a sample of the module that it describes can have.
    """
    bases: dict[str, tuple[Base, ModuleSpec]] = {}
    for name in names:
        if parse_sample_name(name) is None:
            continue
        try:
            yield _self_description(name, folder, bases)
        except BankError:
            continue


def _self_description(name: str, folder: Folder, bases: dict[str, tuple[Base, ModuleSpec]]) -> Found:
    size = folder.size(name)
    metadata = _metadata(name, folder)
    info, file = _parsed(metadata, "info", name), metadata.get("base")
    base: Base | None = None
    if file is None:
        spec = ModuleSpec.from_json(_parsed(metadata, "module", name))
    else:
        if str(file) not in bases:
            bases[str(file)] = _intact_base(str(file), folder)
        base, spec = bases[str(file)]
    sizes = sizes_of(spec, base)
    check_size(name, size, sizes)
    data = folder.read(name, sizes.high)
    parsed = parse_sample_name(name)
    if parsed is None or checksum(data) != parsed[2]:
        raise BankError(f"{name} was altered: its checksum does not match.")
    record = Record.from_json({"info": info, "file": name, "size": len(data)}, sizes)
    parse_sample(data, spec, name, base)
    return Found(record, spec, base)


def _intact_base(file: str, folder: Folder) -> tuple[Base, ModuleSpec]:
    digest = base_checksum(file)
    if digest is None:
        raise BankError(f"{file!r:.120} is not the file name of a base.")
    base, spec = described_base(_metadata(file, folder), file, folder.size(file))
    data = folder.read(file, sizes_of(spec).high)
    if checksum(data) != digest:
        raise BankError(f"{file} was altered: its checksum does not match.")
    if base.kind == "stored":
        parse_base(data, spec, base)
    return base, spec


def _metadata(name: str, folder: Folder) -> dict[str, Any]:
    length = int.from_bytes(folder.head(name, 8), "little")
    if not 2 <= length <= _MAX_HEADER:
        raise BankError(f"{name} does not describe itself: its header would have {length} bytes.")
    data = folder.head(name, 8 + length)[8:]
    check_json_size(data)
    try:
        metadata = json.loads(data)["__metadata__"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BankError(f"{name} does not describe itself: {error}") from error
    if not isinstance(metadata, dict):
        raise BankError(f"{name} does not describe itself.")
    return metadata


def _parsed(metadata: dict[str, Any], key: str, name: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BankError(f"{name} does not describe itself: {error}") from error
