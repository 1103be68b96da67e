"""Where the samples of a bank are kept: in memory, or as safetensors files in a folder."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from lightning_lpsgld.bank.catalog import Catalog, Change, from_records
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.folder import LocalFolder, RemoteFolder
from lightning_lpsgld.bank.journal import header, journal_name, line, replay
from lightning_lpsgld.bank.lock import FileLock
from lightning_lpsgld.bank.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest
from lightning_lpsgld.bank.records import Record, checksum, parse_sample_name, sample_name
from lightning_lpsgld.bank.recovery import intact_samples
from lightning_lpsgld.bank.sample import SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec
from lightning_lpsgld.bank.tensors import check_tensors, parse_sample, sample_bytes

__all__ = ["FileStore", "MemoryStore", "SampleStore"]

log = logging.getLogger(__name__)

#: A journal is folded into the manifest when it has at least so many lines, and half as many as there are samples in the
#: manifest. Then rewriting it costs a constant share of every addition, and most samples are read without replaying.
_MIN_LINES = 1000
_MAX_JOURNAL_BYTES = 2**26


class SampleStore(Protocol):
    """Keeps tensors; the table of contents says which of them count."""

    location: str | None
    #: Files of samples that the table of contents did not name when it was last read.
    unlisted: list[str]

    def acquire(self) -> bool:
        """Become the only writer; whether the contents have changed since they were last read or written here."""

    def release(self) -> None:
        """Let others write."""

    def doubt(self) -> None:
        """Expect that what is kept may be another than what was last read or written here."""

    def load(self) -> Catalog:
        """Read the table of contents."""

    def write(self, info: SampleInfo, spec: ModuleSpec, tensors: dict[str, Tensor]) -> Record:
        """Keep a sample; it counts from the change that names it on."""

    def read(self, record: Record, spec: ModuleSpec) -> dict[str, Tensor]:
        """Tensors of a sample; :class:`BankError` if they are not what was written."""

    def check(self, record: Record, spec: ModuleSpec, *, content: bool) -> str | None:
        """Why a sample is damaged, or ``None``."""

    def save(self, catalog: Catalog) -> None:
        """Make ``catalog`` the truth."""

    def append(self, catalog: Catalog, change: Change) -> None:
        """Make ``catalog`` with ``change`` the truth; the catalog itself is changed by the caller."""

    def clean(self, catalog: Catalog) -> None:
        """Remove what ``catalog.removed`` names, and take out of it what is gone."""


class MemoryStore:
    """Tensors in CPU memory."""

    def __init__(self) -> None:
        self.location: str | None = None
        self.unlisted: list[str] = []
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self._count = 0

    def acquire(self) -> bool:
        """Nobody else has it."""
        return False

    def release(self) -> None:
        """Nothing to do."""

    def doubt(self) -> None:
        """Nothing to do."""

    def load(self) -> Catalog:
        """There is nothing that could be read again."""
        raise BankError("A bank in memory is not kept anywhere else.")

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

    def state(self, catalog: Catalog) -> list[dict[str, Tensor]]:
        """Tensors of every sample that ``catalog`` names, in its order."""
        return [dict(self.tensors[record.file]) for record in catalog.records.values()]

    def adopt(self, catalog: Catalog, samples: object) -> list[Record]:
        """Inverse of :meth:`state`: keep these tensors beside those that are here, under new names.

        Raises:
            BankError: If ``samples`` are not what ``catalog`` describes; nothing is kept then.
        """
        records = list(catalog.records.values())
        if not isinstance(samples, list) or len(samples) != len(records):
            raise BankError("The state of a sample bank does not hold as many samples as its manifest names.")
        for record, tensors in zip(records, samples):
            plain = isinstance(tensors, Mapping) and all(isinstance(tensor, Tensor) for tensor in tensors.values())
            if not plain or catalog.spec is None:
                raise BankError("A sample in the state of a sample bank is not a mapping of tensors.")
            check_tensors(tensors, catalog.spec, f"The sample of chain {record.info.chain}, step {record.info.step}")
        assert catalog.spec is not None or not records
        return [
            self.write(record.info, catalog.spec, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
            for record, tensors in zip(records, samples)
            if catalog.spec is not None
        ]

    def save(self, catalog: Catalog) -> None:
        """Nothing to do: the caller's catalog is the truth."""

    def append(self, catalog: Catalog, change: Change) -> None:
        """Nothing to do: the caller's catalog is the truth."""

    def clean(self, catalog: Catalog) -> None:
        """Drop tensors that are no sample's any more."""
        for file in catalog.removed:
            self.tensors.pop(file, None)
        catalog.removed.clear()


class FileStore:
    """One safetensors file per sample, a manifest and its journal, in a folder with a single writer.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: LocalFolder | RemoteFolder) -> None:
        self.folder = folder
        self.location: str | None = folder.location
        self.unlisted: list[str] = []
        self._lock = FileLock(folder.path) if isinstance(folder, LocalFolder) else None
        self._held = False
        self._journal: str | None = None
        self._lines = 0
        self._folded = 0
        self._torn = False
        self._marks: tuple[object, object] | None = None

    # ------------------------------------------------------------------------------------------------ who may write

    def acquire(self) -> bool:
        """Take the lock, if it is not held; then whether another writer has been here since."""
        if self._held:
            if self._marks is not None:
                self._check_untouched()
            return False
        self._check_there()
        if self._lock is not None:
            self._lock.acquire()
        self._held = True
        self.folder.sweep()
        return self._marks is not None and self._marks != self._current_marks()

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.release()
        self._held = False

    def doubt(self) -> None:
        """Forget how manifest and journal looked."""
        self._marks = None

    def _current_marks(self) -> tuple[object, object]:
        journal = None if self._journal is None else self.folder.mark(journal_name(self._journal))
        return self.folder.mark(MANIFEST), journal

    def _check_there(self) -> None:
        if not self.folder.there():
            raise BankError(
                f"The directory of the bank at {self.location} is gone: it was deleted or moved while it was in use. "
                "Bring it back, or start a new bank elsewhere."
            )

    def _check_untouched(self) -> None:
        if self._marks == self._current_marks():
            return
        self._check_there()
        what = "has lost its manifest" if not self.folder.exists(MANIFEST) else "was changed by another writer"
        raise BankError(
            f"The bank at {self.location} {what} since it was opened. Open it again to see what is there, and give "
            "every process a bank of its own; they can be merged."
        )

    # ------------------------------------------------------------------------------------------- table of contents

    def start(self, catalog: Catalog, *, exist_ok: bool) -> Catalog:
        """Begin a bank with ``catalog``, or continue the one that is there; others cannot write from here on.

        Raises:
            BankError: If one is there and ``exist_ok`` is not set, or it was made otherwise, has lost its manifest, or
                has another writer.
        """
        self.folder.create()
        self.acquire()
        if self.folder.exists(MANIFEST):
            if not exist_ok:
                raise BankError(
                    f"A bank is at {self.location} already. Use `SampleBank.open`, `exist_ok=True`, or another path."
                )
            found = self.load()
            catalog.check_same_retention(found)
            if found.recovered:
                found.adopt_retention(catalog)
                self.save(found)
            return found
        if any(parse_sample_name(name) for name in self.folder.names()):
            raise BankError(f"{self.location} has samples but no {MANIFEST}. `SampleBank.recover` rebuilds it.")
        self.save(catalog)
        return catalog

    def load(self) -> Catalog:
        """Read and check manifest and journal.

        Raises:
            BankError: If one of them is missing or malformed.
        """
        for _ in range(20):  # a writer may fold the journal into the manifest between our two looks
            mark = self.folder.mark(MANIFEST)
            try:
                with _without_collection():
                    manifest = Manifest.loads(self.folder.read(MANIFEST, MAX_MANIFEST_BYTES))
                    return self._replayed(manifest, mark)
            except BankError:
                if self.folder.mark(MANIFEST) == mark:
                    raise
        raise BankError(f"The bank at {self.location} changes faster than it can be read.")

    def _replayed(self, manifest: Manifest, mark: object) -> Catalog:
        catalog = manifest.catalog
        lines, torn, journal_mark = 0, 0, None
        self._folded = len(catalog.records)
        if manifest.journal is not None:
            name = journal_name(manifest.journal)
            journal_mark = self.folder.mark(name)
            lines, torn = replay(catalog, manifest.journal, self.folder.read(name, MAX_MANIFEST_BYTES))
        names = self.folder.names()
        catalog.removed.intersection_update(names)
        named = catalog.files | catalog.removed
        self.unlisted = [n for n in names if n not in named and parse_sample_name(n) is not None]
        self._journal, self._lines, self._torn = manifest.journal, lines, torn > 0
        self._marks = mark, journal_mark
        if torn:
            log.warning(
                "The journal of the bank at %s ends in an unfinished line: an addition was cut short, and does not "
                "count. Files of samples that are not listed: %d.",
                self.location,
                len(self.unlisted),
            )
        return catalog

    def save(self, catalog: Catalog) -> None:
        """Write the manifest anew, with an empty journal behind it."""
        self._check_there()
        journal = secrets.token_hex(8) if self.folder.appends else None
        data = Manifest(catalog, journal).dumps()
        if journal is not None:
            self.folder.write(journal_name(journal), header(journal), unnamed=True)
        self.folder.write(MANIFEST, data)
        self._journal, self._lines, self._torn, self._folded = journal, 1, False, len(catalog.records)
        self._marks = self._current_marks()
        stale = {name for name in self.folder.names() if name.startswith("journal-") and name.endswith(".jsonl")}
        self.folder.remove(stale - ({journal_name(journal)} if journal is not None else set()))

    def append(self, catalog: Catalog, change: Change) -> None:
        """Write a line of the journal; now and then, and where that is not possible, the manifest anew."""
        full = self._lines >= max(_MIN_LINES, self._folded // 2)
        if self._journal is None or self._torn or full or self._journal_size() > _MAX_JOURNAL_BYTES:
            after = catalog.copied()
            after.apply(change)
            self.save(after)
            return
        text = _compact(change)
        self.folder.append(journal_name(self._journal), line(self._journal, self._lines, text))
        self._lines += 1
        self._marks = self._current_marks()

    def _journal_size(self) -> int:
        return 0 if self._journal is None else self.folder.size(journal_name(self._journal))

    def clean(self, catalog: Catalog) -> None:
        """Remove files of discarded samples; what resists is tried again next time."""
        if catalog.removed:
            catalog.removed -= self.folder.remove(catalog.removed)

    # ------------------------------------------------------------------------------------------------------ samples

    def write(self, info: SampleInfo, spec: ModuleSpec, tensors: dict[str, Tensor]) -> Record:
        """Write a sample file, whole or not at all."""
        data = sample_bytes(info, spec, tensors)
        record = Record(info, sample_name(info, checksum(data)), len(data))
        self.folder.write(record.file, data, unnamed=True)
        return record

    def read(self, record: Record, spec: ModuleSpec) -> dict[str, Tensor]:
        """Read a sample file; size, checksum, names, dtypes, shapes and codes are checked first."""
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
            data = self.folder.head(record.file, record.size + 1) if content else b""
            size = self.folder.size(record.file) if len(data) != record.size else record.size
            if size != record.size:
                return f"{record.file} is torn: it has {size} bytes, {record.size} were written."
            if content and checksum(data) != record.checksum:
                return f"{record.file} was altered: its checksum does not match."
        except (BankError, OSError) as error:
            return str(error)
        return None

    def rebuild(self) -> None:
        """Write a manifest of all intact samples over whatever is there; remove nothing else.

        What can be read of the old one is kept: all of it if its journal can be read too, otherwise capacity, policy,
        seed and runs.

        Raises:
            BankError: If there is no intact sample, or there are samples of different modules.
        """
        self._marks = None
        self.acquire()
        try:
            catalog = self.load()
        except BankError:
            catalog = self._from_files()
        else:
            for record, spec in intact_samples(self.folder, self.unlisted):
                if catalog.spec in (None, spec) and record.key not in catalog.records:
                    catalog.spec = spec
                    catalog.apply(Change((record.key,), (record,)))
        self.save(catalog)

    def _from_files(self) -> Catalog:
        found = list(intact_samples(self.folder, self.folder.names()))
        if not found:
            raise BankError(f"{self.location} holds no intact sample.")
        specs = {spec.fingerprint: spec for _, spec in found}
        if len(specs) > 1:
            raise BankError(f"{self.location} holds samples of {len(specs)} modules; move those of one elsewhere.")
        catalog = from_records((record for record, _ in found), found[0][1])
        with contextlib.suppress(BankError):
            old = Manifest.loads(self.folder.read(MANIFEST, MAX_MANIFEST_BYTES)).catalog
            catalog.adopt_retention(old)
            catalog.runs = dict(old.runs)
        return catalog


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Reading makes records by the hundred thousand, none of which is garbage: looking for it takes half the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _compact(change: Change) -> str:
    return json.dumps(change.to_json(), separators=(",", ":"), allow_nan=False)
