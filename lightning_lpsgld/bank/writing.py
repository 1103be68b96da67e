"""The writing side of a bank: one change at a time, and disk and memory that agree whatever interrupts it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from lightning_lpsgld.bank.catalog import Catalog, Change
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.reading import StoredSamples
from lightning_lpsgld.bank.records import Record
from lightning_lpsgld.bank.resume import without_samples_after
from lightning_lpsgld.bank.spec import ModuleSpec
from lightning_lpsgld.bank.store import FileStore

__all__ = ["WrittenSamples"]


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

    def _commit(self, change: Change, spec: ModuleSpec) -> None:
        if not (change.offered or change.records or change.dropped):
            return
        if self.spec is None and change.records:
            after = self._catalog.copied()
            after.spec = spec
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

    def _cut(self, arrivals: dict[int, list[int]], chains: Collection[int]) -> list[Record]:
        after, gone = without_samples_after(self._catalog, arrivals, chains, self._store.unlisted)
        if after is not None:
            self._save(after)
        return gone
