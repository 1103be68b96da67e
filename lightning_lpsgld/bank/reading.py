"""The reading side of a bank: what is in it, and samples one by one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lightning_lpsgld.bank.base import Base
from lightning_lpsgld.bank.catalog import Catalog
from lightning_lpsgld.bank.encoding import check_has_base, encode_tensors
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.memory import MemoryStore
from lightning_lpsgld.bank.records import Record
from lightning_lpsgld.bank.sample import Damage, Sample, SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec, module_tensors
from lightning_lpsgld.bank.store import FileStore

__all__ = ["StoredSamples"]

log = logging.getLogger(__name__)


class StoredSamples:
    """What a bank shows of its samples; :class:`~lightning_lpsgld.bank.SampleBank` adds how they come and go."""

    def _hold(self, store: MemoryStore | FileStore, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog
        self._damaged: dict[str, str] = {}
        #: Files of samples that are damaged only in that the base is.
        self._baseless: set[str] = set()
        #: Tensors of the base, with the checksums that they have: as read, or as given.
        self._shared: tuple[Base, dict[str, Tensor]] | None = None
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
    def base(self) -> Base | None:
        """The tensors that samples leave out because they were frozen; ``None``: none were when samples were added."""
        return self._catalog.base

    @property
    def needs_base(self) -> bool:
        """Whether the bank has only checksums of its base, and was not given it (:meth:`give_base`)."""
        return self.base is not None and self.base.kind == "reference" and not self._base_tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors of all samples (files add a header each); with a base, of files and base."""
        base, spec = self.base, self.spec
        if base is None or spec is None:
            return 0 if spec is None else len(self) * spec.nbytes
        once = base.nbytes(spec) if base.kind == "stored" else 0
        if self.path is None:
            return once + sum(record.size - 1 for record in self._usable)
        return base.size + sum(record.size for record in self._usable)

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
        spec, base = self.spec, self.base
        assert spec is not None
        own = self._store.read(record, spec, base)
        shared = {} if base is None or len(own) == len(spec.stored) else self._base_tensors()
        return Sample.of(record.info, spec, own, base, shared)

    def _base_tensors(self) -> dict[str, Tensor]:
        """Tensors of the base, read at the first need; none if only their checksums are known."""
        with self._guard:
            base, spec = self.base, self.spec
            if base is None or spec is None:
                return {}
            if self._shared is None or not base.same_tensors(self._shared[0]):
                if base.kind == "reference":
                    return {}
                self._shared = base, self._store.read_base(base, spec)
            return self._shared[1]

    def give_base(self, weights: nn.Module | Mapping[str, Tensor]) -> None:
        """Give the tensors that no sample has, because they were frozen: of a bank that holds only their checksums.

        Then every sample is whole (:attr:`.Sample.entries`, :meth:`.Sample.state_dict`), and loads into any module
        built alike. It also replaces a base that was stored and has been damaged. A copy is kept in CPU memory.

        Args:
            weights: The module as it was when training began, or any mapping that has these tensors by name.

        Raises:
            BankError: If one is missing, or is not what it was.

        Example:
            >>> import torch
            >>> from lightning_lpsgld import SampleBank
            >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 1))
            >>> bank = SampleBank(base="reference")
            >>> _ = bank.add(net, step=1)
            >>> bank.needs_base, bank.nbytes
            (True, 12)
            >>> bank.give_base(net)
            >>> bank.needs_base, sorted(bank[0].state_dict())
            (False, ['0.bias', '0.weight', '1.bias', '1.weight'])
        """
        base, spec = self.base, self.spec
        if base is None or spec is None:
            return
        tensors = module_tensors(weights) if isinstance(weights, nn.Module) else dict(weights)
        entries = {entry.name: entry for entry in spec.entries if entry.name in base.digests}
        missing = sorted(entries.keys() - tensors.keys())
        if missing:
            raise BankError(f"The weights lack {len(missing)} frozen tensors of the bank, {missing[0]!r} among them.")
        check_has_base(tensors, entries, base)
        with self._guard:
            self._shared = base, encode_tensors(tensors, ModuleSpec(tuple(entries.values())))
            self._damaged = {file: why for file, why in self._damaged.items() if file not in self._baseless}
            self._baseless, self._cache = set(), None

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
            spec, self._damaged, self._baseless, self._cache = self.spec, {}, set(), None
            problem = self._base_problem(content)
            for record in self._catalog.records.values():
                reason = None if spec is None else self._store.check(record, spec, content=content)
                if reason is None and problem is not None and spec and not self._store.is_whole(record, spec):
                    reason = problem
                    self._baseless.add(record.file)
                if reason is not None:
                    self._damaged[record.file] = reason
                    log.warning("Sample of chain %d, step %d is left out: %s", *record.key, reason)
            return self.damaged

    def _base_problem(self, content: bool) -> str | None:
        """Why samples cannot take tensors from the base; what is only described there is not missed."""
        base, spec = self.base, self.spec
        given = base is not None and self._shared is not None and base.same_tensors(self._shared[0])
        if base is None or spec is None or given:
            return None
        reason = self._store.check_base(base, spec, content=content)
        if reason is None:
            return None
        if base.kind == "reference":
            log.warning(
                "What describes the base of the bank at %s is damaged; recover() would miss it: %s", self.path, reason
            )
            return None
        return f"its base, {reason} Give the weights that training began with: `SampleBank.open(path, base=module)`."
