"""The reading side of a bank: what is in it, and samples one by one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

from torch import nn

from lightning_lpsgld.bank.catalog import Catalog
from lightning_lpsgld.bank.records import Record
from lightning_lpsgld.bank.sample import Damage, Sample, SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec
from lightning_lpsgld.bank.store import FileStore, MemoryStore

__all__ = ["StoredSamples"]

log = logging.getLogger(__name__)


class StoredSamples:
    """What a bank shows of its samples; :class:`~lightning_lpsgld.bank.SampleBank` adds how they come and go."""

    def _hold(self, store: MemoryStore | FileStore, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog
        self._damaged: dict[str, str] = {}
        self._guard = threading.RLock()
        self._cache: list[Record] | None = None

    @property
    def path(self) -> str | None:
        """Where the bank is; ``None`` in memory."""
        return self._store.location

    @property
    def fingerprint(self) -> str | None:
        """Hash of the module's names, shapes, dtypes and formats; ``None`` while the bank is empty."""
        return None if self.spec is None else self.spec.fingerprint

    @property
    def spec(self) -> ModuleSpec | None:
        """The module's description; ``None`` while the bank is empty."""
        return self._catalog.spec

    @property
    def runs(self) -> dict[int, str]:
        """Per chain, the id of the run that writes it, where one has said so (:meth:`claim`)."""
        return dict(self._catalog.runs)

    @property
    def unlisted(self) -> list[str]:
        """Files of samples that are in the directory without being in the bank: :meth:`recover` takes intact ones in.

        An addition that a crash cut short leaves one, and a journal that was cut leaves those of its lost lines.
        """
        return list(self._store.unlisted)

    @property
    def _usable(self) -> list[Record]:
        with self._guard:
            if self._cache is None:
                records = self._catalog.records.values()
                self._cache = [record for record in records if record.file not in self._damaged]
            return self._cache

    @property
    def infos(self) -> list[SampleInfo]:
        """Metadata of all samples, in the order of their index; no tensor is read."""
        return [record.info for record in self._usable]

    @property
    def steps(self) -> list[int]:
        """Step of each sample."""
        return [record.info.step for record in self._usable]

    @property
    def chains(self) -> list[int]:
        """Labels of the chains, ascending, each once."""
        return sorted({record.info.chain for record in self._usable})

    @property
    def damaged(self) -> list[Damage]:
        """Samples that cannot be used, and why."""
        broken = (record for record in self._catalog.records.values() if record.file in self._damaged)
        return [Damage(record.info, record.file, self._damaged[record.file]) for record in broken]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors of all samples (files add a header each)."""
        return 0 if self.spec is None else len(self) * self.spec.nbytes

    @property
    def nbytes_fp32(self) -> int:
        """Bytes that as many float32 ``state_dict`` copies would take."""
        return 0 if self.spec is None else len(self) * self.spec.nbytes_fp32

    def __len__(self) -> int:
        return len(self._usable)

    def __iter__(self) -> Iterator[Sample]:
        for record in list(self._usable):
            yield self._read(record)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"at {self.path}"
        damaged = f", {len(self._damaged)} damaged" if self._damaged else ""
        return f"<SampleBank {where}: {len(self)} samples of {len(self.chains)} chains, {self.nbytes} bytes{damaged}>"

    def sample(self, index: int) -> Sample:
        """Sample number ``index``, read and checked.

        Raises:
            IndexError: If there is no such sample.
            BankError: If its file has been damaged since the bank was opened.
        """
        return self._read(self._usable[index])

    def _read(self, record: Record) -> Sample:
        assert self.spec is not None
        return Sample(record.info, self.spec, self._store.read(record, self.spec))

    def load_into(self, module: nn.Module, index: int) -> None:
        """Write sample number ``index`` into the module's own tensors, in place and without rounding.

        Args:
            module: The module that was sampled, or one built like it; any device.
            index: 0 to ``len(bank) - 1``; negative ones count from the end.

        Raises:
            IndexError: If there is no such sample.
            BankError: If the module differs in a name, shape or dtype, or the file is damaged; nothing is written then.
        """
        self.sample(index).load_into(module)

    def verify(self, *, content: bool = True) -> list[Damage]:
        """Check every file again.

        Args:
            content: Compare checksums; otherwise sizes only.

        Returns:
            The damaged samples, also kept as :attr:`damaged`.
        """
        with self._guard:
            spec, self._damaged, self._cache = self.spec, {}, None
            for record in self._catalog.records.values():
                reason = None if spec is None else self._store.check(record, spec, content=content)
                if reason is not None:
                    self._damaged[record.file] = reason
                    log.warning("Sample of chain %d, step %d is left out: %s", *record.key, reason)
            return self.damaged
