"""Samples that are found without a table of contents: each file describes itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.folder import Folder
from lightning_lpsgld.bank.manifest import check_json_size
from lightning_lpsgld.bank.records import Record, check_size, checksum, largest_file, parse_sample_name
from lightning_lpsgld.bank.spec import ModuleSpec
from lightning_lpsgld.bank.tensors import parse_sample

__all__ = ["intact_samples"]

#: Longest header of a safetensors file that is looked at; those of a million tensors fit.
_MAX_HEADER = 2**28


def intact_samples(folder: Folder, names: Iterable[str]) -> Iterable[tuple[Record, ModuleSpec]]:
    """Intact samples among ``names``; damaged files and others are passed over.

    No more of a file is read than a sample of the module that it describes can have.
    """
    for name in names:
        if parse_sample_name(name) is None:
            continue
        try:
            yield _self_description(name, folder)
        except BankError:
            continue


def _self_description(name: str, folder: Folder) -> tuple[Record, ModuleSpec]:
    size = folder.size(name)
    info, spec = _metadata(name, folder)
    check_size(name, size, spec)
    data = folder.read(name, largest_file(spec))
    parsed = parse_sample_name(name)
    if parsed is None or checksum(data) != parsed[2]:
        raise BankError(f"{name} was altered: its checksum does not match.")
    record = Record.from_json({"info": info, "file": name, "size": len(data)}, spec)
    parse_sample(data, spec, name)
    return record, spec


def _metadata(name: str, folder: Folder) -> tuple[Any, ModuleSpec]:
    length = int.from_bytes(folder.head(name, 8), "little")
    if not 2 <= length <= _MAX_HEADER:
        raise BankError(f"{name} does not describe itself: its header would have {length} bytes.")
    data = folder.head(name, 8 + length)[8:]
    check_json_size(data)
    try:
        metadata = json.loads(data)["__metadata__"]
        return json.loads(metadata["info"]), ModuleSpec.from_json(json.loads(metadata["module"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BankError(f"{name} does not describe itself: {error}") from error
