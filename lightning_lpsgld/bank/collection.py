"""The bank itself: posterior samples that are added once and read often."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from lightning_lpsgld.bank.catalog import Catalog, Change, check_run, check_same_module, merged_labels
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.folder import open_folder
from lightning_lpsgld.bank.manifest import MANIFEST, Manifest
from lightning_lpsgld.bank.resume import readopted, resume_report, without_samples_after
from lightning_lpsgld.bank.retention import Policy, check_retention
from lightning_lpsgld.bank.sample import SampleInfo, encode_tensors
from lightning_lpsgld.bank.spec import Formats, ModuleSpec, formats_by_name, module_tensors
from lightning_lpsgld.bank.store import FileStore, MemoryStore
from lightning_lpsgld.bank.writing import WrittenSamples

__all__ = ["SampleBank"]

log = logging.getLogger(__name__)


class SampleBank(WrittenSamples):
    r"""Posterior samples of one module, as codes and exponents; in memory or in a directory that survives crashes.

    A parameter on the grid of a format is stored as integer codes (and exponents, per block), losslessly; everything
    else (BatchNorm statistics, float32 parameters, counters) as it is; tied weights once. Loading copies values back
    and rounds nothing.

    A directory holds one safetensors file per sample, named after chain, step and checksum, ``manifest.json``, and a
    journal of what was added since the manifest was written. A sample is on the disk before the journal names it, so
    that a crash at any moment leaves the bank as it was before or after the call. No pickle is written or read.

    **One writer.** Creating or continuing a bank locks its directory until :meth:`close`, the end of the object or of
    the process; a bank from :meth:`open` is locked from its first change on. Threads may share one object. What each
    call may remove is the table in ``docs/durability.md``; nothing else ever removes a sample.

    **Where the promise stops.** Behind fsspec there is no lock. Codes below 8 bits take a byte each. What modules keep
    outside parameters and persistent buffers (``get_extra_state``) is not stored.

    Args:
        path: Directory of a new bank, or an address that fsspec knows (``"s3://..."``; see
            :class:`~lightning_lpsgld.bank.folder.RemoteFolder` for what is promised there). ``None``: in memory.
        capacity: Most samples kept **per chain**; ``None``: all.
        policy: What a full bank does: ``"thin"`` keeps every 2nd, 4th, ... so that samples stay spread over the whole
            chain; ``"reservoir"`` a uniform random subset; ``"last"`` the newest.
        seed: Seed of the reservoir's draws.
        exist_ok: Continue the bank that is at ``path`` already; its capacity, policy and seed must be those given.

    Raises:
        BankError: If a bank is there already and ``exist_ok`` is not set, another writer has it open, or an argument
            is out of range.

    Example:
        >>> import torch
        >>> from lightning_lpsgld.ops import quantize
        >>> module = torch.nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     for p in module.parameters():
        ...         _ = p.copy_(quantize(p, "bfp8", rounding="nearest"))
        >>> bank = SampleBank()
        >>> bank.add(module, step=100, formats="bfp8").step
        100
        >>> before = module.weight.detach().clone()
        >>> _ = torch.nn.init.zeros_(module.weight)
        >>> bank.load_into(module, 0)
        >>> torch.equal(module.weight, before), bank.nbytes, bank.nbytes_fp32
        (True, 12, 32)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        capacity: int | None = None,
        policy: Policy = "thin",
        seed: int = 0,
        exist_ok: bool = False,
    ) -> None:
        check_retention(capacity, policy, seed)
        self._hold(MemoryStore(), Catalog(capacity=capacity, policy=policy, seed=seed))
        if path is None:
            return
        store = FileStore(open_folder(path))
        try:
            self._catalog = store.start(self._catalog, exist_ok=exist_ok)
            self._store = store
            self.verify()
        except BaseException:
            store.release()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> SampleBank:
        """Open the bank at ``path``, to read it or to add to it.

        Args:
            path: Its directory or fsspec address.
            verify: Read every file and compare its checksum; otherwise only sizes are compared. A sample is checked in
                full again whenever it is loaded.

        Returns:
            The bank. Samples whose file is missing, torn or altered are listed in :attr:`damaged`, logged as a
            warning, and not among the others.

        Raises:
            BankError: If there is no bank, or its manifest is malformed.
        """
        bank = cls()
        store = FileStore(open_folder(path))
        if not store.folder.exists(MANIFEST):
            raise BankError(f"There is no sample bank at {store.location}: it has no {MANIFEST}.")
        bank._store, bank._catalog = store, store.load()
        bank.verify(content=verify)
        return bank

    @classmethod
    def recover(cls, path: str | os.PathLike[str]) -> SampleBank:
        """Rebuild a lost or altered manifest from the sample files, each of which describes itself, and open the bank.

        Samples are ordered by step and chain. Files that do not match their own checksum are left where they are and
        are not named by the new manifest. Where nothing of the old manifest can be read, capacity and the history of
        rejected samples are unknown; the bank then takes them from the next run or checkpoint that continues it.

        Raises:
            BankError: If there is no intact sample, there are samples of different modules, or the bank has a writer.
        """
        store = FileStore(open_folder(path))
        try:
            store.rebuild()
        finally:
            store.release()
        return cls.open(path)

    def __enter__(self) -> SampleBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(
        self,
        source: nn.Module | Mapping[str, Tensor],
        *,
        step: int,
        cycle: int | None = None,
        chain: int = 0,
        temperature: float | None = None,
        lr: float | None = None,
        formats: Formats = None,
        metrics: Mapping[str, float] | None = None,
    ) -> SampleInfo | None:
        """Add a sample; one with the same chain and step is replaced.

        Args:
            source: The module, or a mapping such as its ``state_dict`` (of full tensors, where a module is sharded).
            step: Optimizer step after which it is taken.
            cycle: Learning-rate cycle.
            chain: Label of the chain.
            temperature: Temperature of the sampler.
            lr: Learning rate.
            formats: Which parameters lie on which grid: a mapping from names, one format for all floating
                parameters, or ``None``: none does. Buffers are stored as they are unless a mapping names them.
            metrics: Numbers measured at that step.

        Returns:
            The sample's metadata, or ``None`` if the bank is full and its policy passes the sample over.

        Raises:
            BankError: If a value is not finite or not on its grid, the module or its formats differ from those in the
                bank, the metadata is malformed, or another writer has the bank open. The bank is then unchanged.
        """
        info = SampleInfo(step, cycle, chain, temperature, lr, metrics or {})
        tensors = module_tensors(source) if isinstance(source, nn.Module) else dict(source)
        spec = ModuleSpec.of(tensors, formats_by_name(tensors, formats))
        with self._writing():
            if spec == self.spec:
                spec = self.spec
            check_same_module(self._catalog, spec)
            change, kept = self._catalog.planned([info])
            if kept:
                record = self._store.write(info, spec, encode_tensors(tensors, spec))
                change = replace(change, records=(record,))
            self._commit(change, spec)
        return info if kept else None

    def compact(self) -> None:
        """Write the manifest anew, so that it names every sample without a journal; it happens by itself in time."""
        with self._writing():
            self._save(self._catalog)

    def claim(self, run: str, chains: Iterable[int]) -> None:
        """Note that ``chains`` are written by the run with that id, and by no other.

        Args:
            run: 16 hexadecimal digits, drawn at random when a run starts.
            chains: Labels of its chains.

        Raises:
            BankError: If one of them has samples of another run.
        """
        check_run(run)
        chains = list(chains)
        with self._writing():
            self._catalog.check_runs(run, [c for c in chains if c in self._catalog.arrivals], self.path)
            after = self._catalog.copied()
            after.runs.update(dict.fromkeys(chains, run))
            if after.runs != self._catalog.runs:
                self._save(after)

    def truncate(self, step: int, *, chains: Collection[int] | None = None) -> int:
        """Drop samples taken after ``step``: what a run that resumes from a checkpoint at ``step`` has to do.

        With the samples of the repeated steps added again, the bank is that of an uninterrupted run, whatever its
        policy. (Until those steps are repeated, samples that a full bank had already discarded stay missing.)

        Args:
            step: The last step whose sample stays.
            chains: Only samples of these chains; ``None``: of all.

        Returns:
            How many samples were dropped.
        """
        with self._writing():
            labels = set(self._catalog.arrivals) if chains is None else set(chains)
            return len(self._cut(self._catalog.truncated_arrivals(step, labels), labels))

    def merge(self, other: SampleBank, *, chains: Literal["keep", "renumber"] = "keep") -> None:
        """Add all samples of another bank of the same module.

        Args:
            other: The bank to read; not changed.
            chains: ``"keep"`` takes its chain labels, ``"renumber"`` numbers its chains after those of this bank.

        Raises:
            BankError: If the modules or formats differ, or with ``"keep"`` both banks have a sample of the same chain
                and step, or a chain is one run's here and another's there.
        """
        spec = other.spec
        if spec is None:
            return
        with self._writing():
            check_same_module(self._catalog, spec)
            labels = merged_labels(self._catalog, other._catalog, other.infos, chains)
            infos = [replace(info, chain=labels[info.chain]) for info in other.infos]
            change, kept = self._catalog.planned(infos)
            records = []
            for index, info in enumerate(infos):
                if (info.chain, info.step) in kept:
                    records.append(self._store.write(info, spec, dict(other.sample(index).tensors)))
            self._commit(replace(change, records=tuple(records)), spec)
            runs = {labels[chain]: run for chain, run in other.runs.items() if chain in labels}
            if not runs.items() <= self._catalog.runs.items():
                after = self._catalog.copied()
                after.runs.update(runs)
                self._save(after)

    @classmethod
    def merged(
        cls,
        sources: Iterable[SampleBank | str | os.PathLike[str]],
        into: str | os.PathLike[str] | None = None,
        *,
        chains: Literal["keep", "renumber"] = "renumber",
    ) -> SampleBank:
        """New bank with the samples of several runs.

        Args:
            sources: Banks or their paths.
            into: Path of the new bank; ``None``: in memory.
            chains: As for :meth:`merge`; ``"renumber"`` counts chains from 0 over the sources in order.

        Raises:
            BankError: As :meth:`merge`.
        """
        bank = cls(into)
        for source in sources:
            bank.merge(source if isinstance(source, SampleBank) else cls.open(source), chains=chains)
        return bank

    # -------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries: all of a bank in memory; of a durable one the table of contents.

        Plain containers and tensors only, so that ``torch.load(weights_only=True)`` reads it.
        """
        with self._guard:
            manifest = Manifest(self._catalog).to_json()
            if not isinstance(self._store, MemoryStore):
                return {"manifest": manifest, "samples": None}
            return {"manifest": manifest, "samples": self._store.state(self._catalog)}

    def load_state_dict(self, state: Mapping[str, Any], *, chains: Collection[int] | None = None) -> None:
        """Become the bank that the checkpoint knew, in the chains that are this run's own.

        In memory, its samples replace those of these chains. A durable bank drops the samples of these chains that
        came after the checkpoint (see :meth:`truncate`). What is dropped, and what the checkpoint knew and is gone, is
        logged as a warning, with counts. Other chains are never touched.

        Args:
            state: What :meth:`state_dict` returned.
            chains: The run's own chains; ``None``: those that the checkpoint knew, and all of a bank in memory.

        Raises:
            BankError: If it is malformed, of a bank of another kind, capacity or policy, or of another module, or if
                one of these chains is another run's by now.
        """
        if not isinstance(state, Mapping) or set(state) != {"manifest", "samples"}:
            raise BankError("The state of a sample bank must have `manifest` and `samples`.")
        known = Manifest.from_json(state["manifest"]).catalog
        self._catalog.check_same_retention(known)
        if (state["samples"] is None) == isinstance(self._store, MemoryStore):
            raise BankError("A bank in memory and one in a directory cannot resume from each other's checkpoint.")
        if known.spec is not None and not (isinstance(self._store, MemoryStore) and chains is None):
            check_same_module(self._catalog, known.spec)
        with self._writing():
            own = set(known.arrivals) if chains is None else set(chains)
            for chain in own & known.runs.keys():
                self._catalog.check_runs(known.runs[chain], [chain], self.path)
            if isinstance(self._store, MemoryStore):
                self._adopt_memory(
                    known, state["samples"], own if chains is not None else {*own, *self._catalog.arrivals}
                )
            else:
                self._resume(self._store, known, own)

    def _adopt_memory(self, known: Catalog, samples: object, chains: set[int]) -> None:
        assert isinstance(self._store, MemoryStore)
        records = self._store.adopt(known, samples)
        after, _ = without_samples_after(self._catalog, {}, chains, ())
        after = self._catalog.copied() if after is None else after
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
        readopted(after, known, chains, lambda record, spec: store.check(record, spec, content=True) is None)
        after.runs.update({chain: run for chain, run in known.runs.items() if chain in chains})
        if after != before:
            self._save(after)
        for message in resume_report(before, known, chains, gone, {record.key for record in self._usable}, self.path):
            log.warning(message)
