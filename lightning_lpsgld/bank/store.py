"""Samples of a bank as safetensors files in a folder, with a manifest and its journal."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from lightning_lpsgld.bank.base import Base, base_checksum, base_name
from lightning_lpsgld.bank.catalog import Catalog, Change, from_records
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.folder import LocalFolder, RemoteFolder
from lightning_lpsgld.bank.journal import header, journal_name, line, replay
from lightning_lpsgld.bank.lock import FileLock
from lightning_lpsgld.bank.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest
from lightning_lpsgld.bank.records import Record, checksum, parse_sample_name, sample_name
from lightning_lpsgld.bank.recovery import Found, check_vacant, has_samples, intact_samples, most_common_base
from lightning_lpsgld.bank.sample import Sample, SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec
from lightning_lpsgld.bank.tensors import base_bytes, parse_base, parse_sample, sample_bytes

__all__ = ["FileStore", "SampleStore"]

log = logging.getLogger(__name__)

#: A journal is folded into the manifest when it has at least so many lines, and half as many as the manifest names
#: samples. Then rewriting it costs a constant share of every addition, and most samples are read without replaying.
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

    def write(self, info: SampleInfo, spec: ModuleSpec, tensors: dict[str, Tensor], base: Base | None) -> Record:
        """Keep a sample, what ``base`` has of it left out; it counts from the change that names it on."""

    def read(self, record: Record, spec: ModuleSpec, base: Base | None) -> dict[str, Tensor]:
        """Tensors kept with a sample; :class:`BankError` if they are not what was written."""

    def check(self, record: Record, spec: ModuleSpec, *, content: bool) -> str | None:
        """Why a sample is damaged, or ``None``."""

    def is_whole(self, record: Record, spec: ModuleSpec) -> bool:
        """Whether a sample takes nothing from the base."""

    def write_base(self, base: Base, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Base:
        """Keep a base, its tensors only if it is to be stored; what the table of contents says of it."""

    def read_base(self, base: Base, spec: ModuleSpec) -> dict[str, Tensor]:
        """Tensors of a base that is stored; :class:`BankError` if they are not what was written."""

    def check_base(self, base: Base, spec: ModuleSpec, *, content: bool) -> str | None:
        """Why a base is damaged, or ``None``."""

    def save(self, catalog: Catalog) -> None:
        """Make ``catalog`` the truth."""

    def append(self, catalog: Catalog, change: Change) -> None:
        """Make ``catalog`` with ``change`` the truth; the catalog itself is changed by the caller."""

    def clean(self, catalog: Catalog) -> None:
        """Remove what ``catalog.removed`` names, and take out of it what is gone."""


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
        if exist_ok and self.folder.exists(MANIFEST):
            found = self.load()
            catalog.check_same_retention(found)
            if found.recovered:
                found.adopt_retention(catalog)
                self.save(found)
            return found
        check_vacant(self.folder)
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
            except BankError as error:
                if self.folder.mark(MANIFEST) == mark:
                    raise self.explained(str(error)) from error.__cause__
        raise BankError(f"The bank at {self.location} changes faster than it can be read.")

    def explained(self, text: str) -> BankError:
        """An error with the place, and with the way back where there are samples."""
        text = text if str(self.location) in text else f"{self.location}: {text}"
        if "recover" not in text and has_samples(self.folder):
            text += " There are samples: `SampleBank.recover(path)`, or `lpsgld bank recover PATH`, lists them anew."
        return BankError(text)

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

    def write(self, info: SampleInfo, spec: ModuleSpec, tensors: dict[str, Tensor], base: Base | None) -> Record:
        """Write a sample file, whole or not at all."""
        data = sample_bytes(info, spec, tensors, base)
        record = Record(info, sample_name(info, checksum(data)), len(data))
        self.folder.write(record.file, data, unnamed=True)
        return record

    def read(self, record: Record, spec: ModuleSpec, base: Base | None) -> dict[str, Tensor]:
        """Read a sample file; size, checksum, names, dtypes, shapes and codes are checked first."""
        return parse_sample(self._content(record.file, record.size, record.checksum), spec, record.file, base)

    def _content(self, file: str, size: int, digest: str) -> bytes:
        data = self.folder.read(file, size)
        if len(data) != size:
            raise BankError(f"{file} is torn: it has {len(data)} bytes, {size} were written.")
        if checksum(data) != digest:
            raise BankError(f"{file} was altered: its checksum does not match.")
        return data

    def check(self, record: Record, spec: ModuleSpec, *, content: bool) -> str | None:
        """Why a sample is damaged: its size, and its checksum if ``content`` is asked for."""
        return self._why_damaged(record.file, record.size, record.checksum, content)

    def _why_damaged(self, file: str, size: int, digest: str, content: bool) -> str | None:
        try:
            data = self.folder.head(file, size + 1) if content else b""
            found = self.folder.size(file) if len(data) != size else size
            if found != size:
                return f"{file} is torn: it has {found} bytes, {size} were written."
            if content and checksum(data) != digest:
                return f"{file} was altered: its checksum does not match."
        except (BankError, OSError) as error:
            return str(error)
        return None

    def is_whole(self, record: Record, spec: ModuleSpec) -> bool:
        """Whether a sample takes nothing from the base; reads its file."""
        with contextlib.suppress(BankError, OSError):
            self.read(record, spec, None)
            return True
        return False

    def write_base(self, base: Base, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Base:
        """Write the file of a base, whole or not at all."""
        data = base_bytes(base, spec, tensors)
        file = base_name(checksum(data))
        self.folder.write(file, data, unnamed=True)
        return Base(base.kind, base.digests, file, len(data))

    def read_base(self, base: Base, spec: ModuleSpec) -> dict[str, Tensor]:
        """Read the file of a base; everything is checked first."""
        if base.file is None:
            raise BankError(f"The manifest of {self.location} names no file for its base.")
        return parse_base(self._content(base.file, base.size, base_checksum(base.file) or ""), spec, base)

    def check_base(self, base: Base, spec: ModuleSpec, *, content: bool) -> str | None:
        """Why a base is damaged: its size, and its checksum if ``content`` is asked for."""
        if base.file is None:
            return "the manifest names no file for it."
        return self._why_damaged(base.file, base.size, base_checksum(base.file) or "", content)

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
            for found in intact_samples(self.folder, self.unlisted):
                if catalog.spec not in (None, found.spec) or found.record.key in catalog.records:
                    continue
                catalog.spec, catalog.base = found.spec, catalog.base or found.base
                catalog.kind = catalog.kind if catalog.base is None else catalog.base.kind
                record = self._beside(found, catalog.base)
                if record is not None:
                    catalog.apply(Change((record.key,), (record,)))
        self.save(catalog)

    def _from_files(self) -> Catalog:
        found = list(intact_samples(self.folder, self.folder.names()))
        if not found:
            raise BankError(f"{self.location} holds no intact sample.")
        specs = {one.spec.fingerprint for one in found}
        if len(specs) > 1:
            raise BankError(f"{self.location} holds samples of {len(specs)} modules; move those of one elsewhere.")
        old: Catalog | None = None
        with contextlib.suppress(BankError):
            old = Manifest.loads(self.folder.read(MANIFEST, MAX_MANIFEST_BYTES)).catalog
        base = most_common_base(found) if old is None or old.base is None else old.base
        records = (self._beside(one, base) for one in found)
        catalog = from_records((record for record in records if record is not None), found[0].spec)
        catalog.base, catalog.kind = base, "stored" if base is None else base.kind
        if old is not None:
            catalog.adopt_retention(old)
            catalog.runs = dict(old.runs)
        return catalog

    def _beside(self, found: Found, base: Base | None) -> Record | None:
        """A sample as one of the bank with that base; written anew if it has left out what another base has."""
        record, spec, theirs = found
        if theirs is None or theirs == base:
            return record
        if theirs.kind == "reference":
            log.warning(
                "%s is left where it is: what it lacks is only known as checksums, in %s.", record.file, theirs.file
            )
            return None
        sample = Sample.of(record.info, spec, self.read(record, spec, theirs), theirs, self.read_base(theirs, spec))
        return self.write(record.info, spec, sample.beside(base), base)


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
