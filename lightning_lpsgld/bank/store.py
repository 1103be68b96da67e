"""Where the samples of a bank are kept: in memory, or as safetensors files in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Protocol

import safetensors.torch
from torch import Tensor

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.folder import Folder, LocalFolder, RemoteFolder
from lightning_lpsgld.bank.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    Record,
    check_size,
    checksum,
    parse_sample_name,
    sample_name,
)
from lightning_lpsgld.bank.sample import SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec

__all__ = ["FileStore", "MemoryStore", "SampleStore", "check_tensors"]


def check_tensors(tensors: Mapping[str, Tensor], spec: ModuleSpec, where: str) -> None:
    """Raise :class:`BankError` unless ``tensors`` are what a sample of ``spec`` consists of."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != spec.stored:
        names = sorted(set(found) ^ set(spec.stored)) or [n for n in spec.stored if found[n] != spec.stored[n]]
        raise BankError(f"{where} does not hold the tensors of this bank's module: `{names[0]}` differs.")


class SampleStore(Protocol):
    """Keeps tensors; the manifest says which of them count."""

    location: str | None

    def write(self, info: SampleInfo, spec: ModuleSpec, tensors: dict[str, Tensor]) -> Record:
        """Keep a sample; it counts from the next :meth:`commit` on."""

    def read(self, record: Record, spec: ModuleSpec) -> dict[str, Tensor]:
        """Tensors of a sample; :class:`BankError` if they are not what was written."""

    def check(self, record: Record, spec: ModuleSpec, *, content: bool) -> str | None:
        """Why a sample is damaged, or ``None``."""

    def commit(self, manifest: Manifest) -> None:
        """Make ``manifest`` the truth, and remove what it does not name."""


class MemoryStore:
    """Tensors in CPU memory."""

    def __init__(self) -> None:
        self.location: str | None = None
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self._count = 0

    def write(self, info: SampleInfo, spec: ModuleSpec, tensors: dict[str, Tensor]) -> Record:
        """Keep the tensors as they are; the "checksum" of the name is a running number."""
        self._count += 1
        record = Record(info, sample_name(info, f"{self._count:040x}"), spec.nbytes + 1)
        self.tensors[record.file] = tensors
        return record

    def read(self, record: Record, spec: ModuleSpec) -> dict[str, Tensor]:
        """The kept tensors."""
        return self.tensors[record.file]

    def check(self, record: Record, spec: ModuleSpec, *, content: bool) -> str | None:
        """Memory is not damaged."""
        return None

    def commit(self, manifest: Manifest) -> None:
        """Drop tensors without a record."""
        named = {record.file for record in manifest.records}
        self.tensors = {file: tensors for file, tensors in self.tensors.items() if file in named}


class FileStore:
    """One safetensors file per sample and a manifest, in a folder with a single writer.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: LocalFolder | RemoteFolder) -> None:
        self.folder = folder
        self.location: str | None = folder.location
        self._seen: bytes | None = None
        self._swept = False

    def load_manifest(self) -> Manifest:
        """Read and check the manifest.

        Raises:
            BankError: If it is missing or malformed.
        """
        data = self.folder.read(MANIFEST, MAX_MANIFEST_BYTES)
        manifest = Manifest.loads(data)
        self._seen = data
        return manifest

    def write(self, info: SampleInfo, spec: ModuleSpec, tensors: dict[str, Tensor]) -> Record:
        """Write a sample file, whole or not at all."""
        self._check_single_writer()
        header = {"format": "lightning_lpsgld.sample", "version": "1", "info": json.dumps(info.to_json())}
        data = safetensors.torch.save(tensors, {**header, "module": json.dumps(spec.to_json())})
        record = Record(info, sample_name(info, checksum(data)), len(data))
        self.folder.write(record.file, data)
        return record

    def read(self, record: Record, spec: ModuleSpec) -> dict[str, Tensor]:
        """Read a sample file; size, checksum, names, dtypes and shapes are checked first."""
        return parse_sample(self._content(record), spec, record.file)

    def _content(self, record: Record) -> bytes:
        data = self.folder.read(record.file, record.size)
        if len(data) != record.size:
            raise BankError(f"{record.file} is torn: it has {len(data)} bytes, {record.size} were written.")
        if checksum(data) != record.checksum:
            raise BankError(f"{record.file} was altered: its checksum does not match.")
        return data

    def check(self, record: Record, spec: ModuleSpec, *, content: bool) -> str | None:
        """Why a sample is damaged: its size, and its checksum if ``content`` is asked for."""
        try:
            size = self.folder.size(record.file)
            if size != record.size:
                return f"{record.file} is torn: it has {size} bytes, {record.size} were written."
            if content:
                self._content(record)
        except (BankError, OSError) as error:
            return str(error)
        return None

    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest, then remove sample files that it does not name and what crashes left behind."""
        self._check_single_writer()
        data = manifest.dumps()
        self.folder.write(MANIFEST, data)
        self._seen = data
        named = {record.file for record in manifest.records}
        self.folder.remove(n for n in self.folder.names() if parse_sample_name(n) is not None and n not in named)
        if not self._swept:
            self.folder.sweep()
            self._swept = True

    def rebuild(self, manifest: Manifest) -> None:
        """Write ``manifest`` over whatever is there, and remove nothing else."""
        self.folder.write(MANIFEST, manifest.dumps())

    def _check_single_writer(self) -> None:
        now = self.folder.read(MANIFEST, MAX_MANIFEST_BYTES) if self.folder.exists(MANIFEST) else None
        if now != self._seen:
            raise BankError(
                f"The bank at {self.location} was changed by another writer since it was opened. "
                "Give every process a bank of its own and merge them."
            )

    def scan(self) -> Iterable[tuple[Record, ModuleSpec]]:
        """Intact samples, found without a manifest; damaged files are passed over."""
        for name in self.folder.names():
            if parse_sample_name(name) is None:
                continue
            try:
                yield _self_description(name, self.folder)
            except BankError:
                continue


def parse_sample(data: bytes, spec: ModuleSpec, where: str) -> dict[str, Tensor]:
    """Tensors of a sample file's content.

    Raises:
        BankError: If it is not a safetensors file of exactly the tensors of ``spec``.
    """
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # what a parser raises on foreign bytes is not ours to list
        raise BankError(f"{where} is not a readable safetensors file: {str(error)[:200]}.") from error
    check_tensors(tensors, spec, where)
    return tensors


def _self_description(name: str, folder: Folder) -> tuple[Record, ModuleSpec]:
    parsed = parse_sample_name(name)
    data = folder.read(name, folder.size(name))
    if parsed is None or checksum(data) != parsed[2]:
        raise BankError(f"{name} was altered: its checksum does not match.")
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        info, spec = json.loads(metadata["info"]), ModuleSpec.from_json(json.loads(metadata["module"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BankError(f"{name} does not describe itself: {error}") from error
    record = Record.from_json({"info": info, "file": name, "size": len(data)}, spec)
    check_size(name, len(data), spec)
    parse_sample(data, spec, name)
    return record, spec
