"""Where the samples of a bank are kept: in memory, or as safetensors files in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Protocol

import safetensors.torch
from torch import Tensor

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.folder import Folder, LocalFolder, RemoteFolder
from lightning_lpsgld.bank.history import check_same_retention, from_records
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

    def state(self, manifest: Manifest) -> list[dict[str, Tensor]]:
        """Tensors of every sample that ``manifest`` names, in its order."""
        return [dict(self.tensors[record.file]) for record in manifest.records]

    @classmethod
    def from_state(cls, manifest: Manifest, samples: object) -> MemoryStore:
        """Inverse of :meth:`state`.

        Raises:
            BankError: If ``samples`` are not what ``manifest`` describes.
        """
        if not isinstance(samples, list) or len(samples) != len(manifest.records):
            raise BankError("The state of a sample bank does not hold as many samples as its manifest names.")
        store = cls()
        for record, tensors in zip(manifest.records, samples):
            plain = isinstance(tensors, Mapping) and all(isinstance(tensor, Tensor) for tensor in tensors.values())
            if not plain or manifest.spec is None:
                raise BankError("A sample in the state of a sample bank is not a mapping of tensors.")
            check_tensors(tensors, manifest.spec, f"The sample of chain {record.info.chain}, step {record.info.step}")
            store.tensors[record.file] = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        store._count = max((int(record.checksum, 16) for record in manifest.records), default=0)
        return store

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
        self._named: set[str] | None = None  # sample files that the last manifest written here names

    def start(self, manifest: Manifest, *, exist_ok: bool) -> Manifest:
        """Begin a bank with ``manifest``, or continue the one that is there.

        Raises:
            BankError: If one is there and ``exist_ok`` is not set, or it was made otherwise, or has lost its manifest.
        """
        self.folder.create()
        if self.folder.exists(MANIFEST):
            if not exist_ok:
                raise BankError(
                    f"A bank is at {self.location} already. Use `SampleBank.open`, `exist_ok=True`, or another path."
                )
            found = self.load_manifest()
            check_same_retention(manifest, found)
            return found
        if any(parse_sample_name(name) for name in self.folder.names()):
            raise BankError(f"{self.location} has samples but no {MANIFEST}. `SampleBank.recover` rebuilds it.")
        self.commit(manifest)
        return manifest

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
        data = _sorted_header(safetensors.torch.save(tensors, {**header, "module": json.dumps(spec.to_json())}))
        record = Record(info, sample_name(info, checksum(data)), len(data))
        self.folder.write(record.file, data)
        if self._named is not None:
            self._named.add(record.file)
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
        if self._named is None:  # only the first time: what a killed process left can be anything
            self._named = {name for name in self.folder.names() if parse_sample_name(name) is not None}
            self.folder.sweep()
        self.folder.remove(self._named - named)
        self._named = named

    def rebuild(self) -> None:
        """Write a manifest of all intact samples over whatever is there; remove nothing else.

        Raises:
            BankError: If there is no intact sample, or there are samples of different modules.
        """
        found = list(self.scan())
        if not found:
            raise BankError(f"{self.location} holds no intact sample.")
        specs = {spec.fingerprint: spec for _, spec in found}
        if len(specs) > 1:
            raise BankError(f"{self.location} holds samples of {len(specs)} modules; move those of one elsewhere.")
        manifest = from_records([record for record, _ in found], found[0][1])
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
