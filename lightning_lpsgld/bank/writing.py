"""The writing side of a bank: one change at a time, and disk and memory that agree whatever interrupts it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_lpsgld.bank.base import Base, BaseKind, constant_entries, new_digests
from lightning_lpsgld.bank.catalog import Catalog, Change
from lightning_lpsgld.bank.encoding import encode_tensors, is_in_base
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.memory import MemoryStore
from lightning_lpsgld.bank.reading import StoredSamples
from lightning_lpsgld.bank.records import Record
from lightning_lpsgld.bank.resume import readopted, resume_report, without_samples_after
from lightning_lpsgld.bank.spec import ModuleSpec
from lightning_lpsgld.bank.store import FileStore

__all__ = ["WrittenSamples"]

log = logging.getLogger(__name__)


class WrittenSamples(StoredSamples):
    """How changes reach the store; :class:`~lightning_lpsgld.bank.SampleBank` says which changes there are."""

    #: Whether a change may have reached the disk that is not in the catalog.
    _unsure = False

    def close(self) -> None:
        """Let others write. The bank can still be read, and written again when nobody else is writing."""
        with self._guard:
            self._store.release()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_guard"}  # locks are not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._guard = threading.RLock()
        self._store.release()

    # ------------------------------------------------------------------------------------------------------ changes

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One change at a time, by the only writer, on what is really there."""
        with self._guard:
            changed = self._store.acquire()
            if self._unsure or changed:
                self._recall()
            yield

    @contextlib.contextmanager
    def _at_once(self) -> Iterator[None]:
        """A step that changes disk and catalog: whatever interrupts it, they agree afterwards."""
        self._unsure = True
        try:
            yield
        except BaseException:
            self._store.doubt()
            with contextlib.suppress(BankError, OSError):  # then the next change tries again
                self._recall()
            raise
        self._unsure = False

    def _recall(self) -> None:
        """Take over what is on the disk."""
        if isinstance(self._store, FileStore):
            self._catalog = self._store.load()
            self.verify(content=False)
        self._unsure, self._cache = False, None

    def _commit(self, change: Change, spec: ModuleSpec, base: Base | None) -> None:
        if not (change.offered or change.records or change.dropped):
            return
        if change.records and (self.spec is None or base != self._catalog.base):
            after = self._catalog.copied()
            after.spec, after.base = spec, base
            after.apply(change)
            self._save(after)
            return
        with self._at_once():
            self._store.append(self._catalog, change)
            self._catalog.apply(change)
        self._settle(change.records)

    def _save(self, catalog: Catalog) -> None:
        with self._at_once():
            self._store.save(catalog)
            self._catalog = catalog
        self._settle()

    def _settle(self, written: Iterable[Record] = ()) -> None:
        self._cache = None
        for record in written:
            self._damaged.pop(record.file, None)
        files = self._catalog.removed | (self._catalog.files if self._damaged or self._store.unlisted else set())
        self._damaged = {file: why for file, why in self._damaged.items() if file in files - self._catalog.removed}
        self._store.unlisted = [file for file in self._store.unlisted if file not in files]
        self._store.clean(self._catalog)

    # ----------------------------------------------------------------------------------------------------- the base

    def _base_for(
        self, tensors: Mapping[str, Tensor], spec: ModuleSpec, constant: Collection[str] | None
    ) -> Base | None:
        """The base beside which these tensors are kept; written now if there is none, or it has been damaged."""
        base = self._catalog.base
        entries = constant_entries(tensors, spec, constant)
        if base is not None:
            entries = [entry for entry in spec.entries if entry.name in base.digests]
            damaged = base.kind == "stored" and self._store.check_base(base, spec, content=False) is not None
            if not damaged or not all(is_in_base(entry, tensors[entry.name], base) for entry in entries):
                return base
        if not entries:
            return None
        stored = encode_tensors(tensors, ModuleSpec(tuple(entries)))
        written = self._store.write_base(Base(self._catalog.kind, new_digests(entries, stored)), spec, stored)
        return written if base is None else base

    def _agree_on_base(self, kind: BaseKind) -> None:
        """Continue with that kind of base; refused if there is one of the other kind."""
        if self._catalog.kind == kind:
            return
        if self.base is not None:
            raise BankError(f"The bank at {self.path} was made with base={self.base.kind!r}, not {kind!r}.")
        after = self._catalog.copied()
        after.kind = kind
        self._save(after)

    def _base_from(self, other: StoredSamples) -> Base | None:
        """The base beside which samples of another bank are kept; if there is none, the other's."""
        theirs, spec = other.base, other.spec
        if self._catalog.base is not None or theirs is None or spec is None:
            return self._catalog.base
        tensors = other._base_tensors()
        if self._catalog.kind == "stored" and not tensors:
            raise BankError(
                "The bank to be merged holds only checksums of its base, which this one is to store. Give the "
                "weights, `SampleBank.open(path, base=module)`, or merge into a bank with base='reference'."
            )
        base = self._store.write_base(Base(self._catalog.kind, theirs.digests), spec, tensors)
        self._shared = (base, tensors) if tensors else None
        return base

    def _cut(self, arrivals: dict[int, list[int]], chains: Collection[int]) -> list[Record]:
        after, gone = without_samples_after(self._catalog, arrivals, chains, self._store.unlisted)
        if after is not None:
            self._save(after)
        return gone

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _adopt_memory(self, known: Catalog, state: Mapping[str, Any], chains: set[int]) -> None:
        assert isinstance(self._store, MemoryStore)
        after, _ = without_samples_after(self._catalog, {}, chains, ())
        after = self._catalog.copied() if after is None else after
        records, after.base = self._store.adopt(known, state, after.base if after.records else None)
        after.kind = after.kind if after.base is None else after.base.kind
        after.spec = known.spec if after.spec is None or not after.records else after.spec
        after.adopt_retention(known)
        after.cut({chain: known.arrivals[chain] for chain in chains if chain in known.arrivals}, chains)
        after.apply(Change((), tuple(record for record in records if record.info.chain in chains)))
        after.runs.update({chain: run for chain, run in known.runs.items() if chain in chains})
        self._save(after)

    def _resume(self, store: FileStore, known: Catalog, chains: set[int]) -> None:
        before = self._catalog
        after, gone = without_samples_after(before, known.arrivals, chains, store.unlisted)
        after = before.copied() if after is None else after
        after.adopt_retention(known)
        base, spec = known.base, known.spec
        if after.base is None and base is not None and spec and store.check_base(base, spec, content=True) is None:
            after.spec, after.base, after.kind = spec, base, base.kind
        readopted(after, known, chains, lambda record, spec: store.check(record, spec, content=True) is None)
        after.runs.update({chain: run for chain, run in known.runs.items() if chain in chains})
        if after != before:
            self._save(after)
        for message in resume_report(before, known, chains, gone, {record.key for record in self._usable}, self.path):
            log.warning(message)
