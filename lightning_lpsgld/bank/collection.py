"""The bank itself: posterior samples that are added once and read often."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from lightning_lpsgld.bank.base import BaseKind, check_base_kind
from lightning_lpsgld.bank.beside import made_beside
from lightning_lpsgld.bank.catalog import Catalog, check_run, check_same_module, merged_labels
from lightning_lpsgld.bank.encoding import encode_tensors
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.folder import open_folder
from lightning_lpsgld.bank.manifest import MANIFEST, Manifest
from lightning_lpsgld.bank.memory import MemoryStore
from lightning_lpsgld.bank.retention import Policy, check_retention
from lightning_lpsgld.bank.sample import SampleInfo
from lightning_lpsgld.bank.spec import Formats, ModuleSpec, formats_by_name, module_tensors
from lightning_lpsgld.bank.store import FileStore
from lightning_lpsgld.bank.writing import WrittenSamples

__all__ = ["SampleBank"]


class SampleBank(WrittenSamples):
    r"""Posterior samples of one module, as codes and exponents; in memory or in a directory that survives crashes.

    A parameter on the grid of a format is stored as integer codes (and exponents, per block), losslessly; everything
    else (BatchNorm statistics, float32 parameters, counters) as it is; tied weights once. Loading copies values back
    and rounds nothing.

    A directory holds one safetensors file per sample, named after chain, step and checksum, ``manifest.json``, and a
    journal of what was added since the manifest was written. A sample is on the disk before the journal names it, so
    that a crash at any moment leaves the bank as it was before or after the call. No pickle is written or read.

    **What no sample changes stands once.** Frozen parameters as they are at the first sample are the bank's *base*; a
    sample keeps only what differs from it, bit for bit. So ten samples of a head on a frozen network take one network
    and ten heads. With ``base="reference"`` not even that: the bank has the checksums,
    and the weights are given again when samples are loaded: by the module itself, or ``open(path, base=module)``.

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
        base: Whether what no sample changes stands in the bank once, ``"stored"``, or only as checksums,
            ``"reference"``. Without frozen parameters there is no difference.
        exist_ok: Continue the bank that is at ``path`` already; its capacity, policy, seed and kind of base must be
            those given.

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
        base: BaseKind = "stored",
        exist_ok: bool = False,
    ) -> None:
        check_retention(capacity, policy, seed)
        check_base_kind(base)
        self._hold(MemoryStore(), Catalog(capacity=capacity, policy=policy, seed=seed, kind=base))
        if path is None:
            return
        store = FileStore(open_folder(path))
        try:
            self._catalog = store.start(self._catalog, exist_ok=exist_ok)
            self._store = store
            self._agree_on_base(base)
            self.verify()
        except BaseException:
            store.release()
            raise

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        base: nn.Module | Mapping[str, Tensor] | None = None,
    ) -> SampleBank:
        """Open the bank at ``path``, to read it or to add to it.

        Args:
            path: Its directory or fsspec address.
            verify: Read every file and compare its checksum; otherwise only sizes are compared. A sample is checked in
                full again whenever it is loaded.
            base: The weights that training began with, for :meth:`give_base`.

        Returns:
            The bank. Samples whose file is missing, torn or altered are listed in :attr:`damaged`, logged as a
            warning, and not among the others.

        Raises:
            BankError: If there is no bank, its manifest is malformed, or ``base`` is not the bank's.
        """
        bank = cls()
        store = FileStore(open_folder(path))
        if not store.folder.exists(MANIFEST):
            raise store.explained(f"There is no sample bank at {store.location}: it has no {MANIFEST}.")
        bank._store, bank._catalog = store, store.load()
        if base is not None:
            bank.give_base(base)
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
        if not store.folder.there():
            raise BankError(f"There is no sample bank at {store.location}: there is no such folder.")
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
        constant: Collection[str] | None = None,
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
            constant: Names of tensors that are expected to be the same in every sample; at the first one they become
                the bank's base. ``None``: parameters that need no gradient. Whatever turns out to change is kept with
                its sample.

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
            base = self.base
            if kept:
                base = self._base_for(tensors, spec, constant)
                record = self._store.write(info, spec, encode_tensors(tensors, spec, base), base)
                change = replace(change, records=(record,))
            self._commit(change, spec, base)
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

    def merge(
        self,
        other: SampleBank,
        *,
        chains: Literal["keep", "renumber"] = "keep",
        indices: Sequence[int] | None = None,
    ) -> None:
        """Add samples of another bank of the same module.

        Args:
            other: The bank to read; not changed.
            chains: ``"keep"`` takes its chain labels, ``"renumber"`` numbers its chains after those of this bank.
            indices: Which samples of the other bank; ``None``: all.

        Raises:
            BankError: If the modules or formats differ, or with ``"keep"`` both banks have a sample of the same chain
                and step, a chain is one run's here and another's there, or what is frozen there is needed here and the
                other bank has only its checksums.
        """
        spec = other.spec
        if spec is None:
            return
        with self._writing():
            check_same_module(self._catalog, spec)
            taken = [(i, other.infos[i]) for i in (range(len(other)) if indices is None else indices)]
            labels = merged_labels(self._catalog, other._catalog, [info for _, info in taken], chains)
            infos = {index: replace(info, chain=labels[info.chain]) for index, info in taken}
            change, kept = self._catalog.planned(list(infos.values()))
            base = self._base_from(other) if kept else self.base
            records = []
            for index, info in infos.items():
                if (info.chain, info.step) in kept:
                    records.append(self._store.write(info, spec, other.sample(index).beside(base), base))
            self._commit(replace(change, records=tuple(records)), spec, base)
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
        base: BaseKind | None = None,
    ) -> SampleBank:
        """New bank with the samples of several runs; whole, or not there at all (:func:`~.beside.made_beside`).

        Args:
            sources: Banks or their paths.
            into: Path of the new bank; ``None``: in memory.
            chains: As for :meth:`merge`; ``"renumber"`` counts chains from 0 over the sources in order.
            base: As for the class; ``None``: as the first source that has one.

        Raises:
            BankError: As :meth:`merge`.
        """
        banks = [source if isinstance(source, SampleBank) else cls.open(source) for source in sources]
        known = [(source._catalog, source.spec) for source in banks if source.spec is not None]
        for _, spec in known:
            check_same_module(known[0][0], spec)  # before anything is made
        kinds = [source.base.kind for source in banks if source.base is not None]
        kind: BaseKind = base or (kinds[0] if kinds else "stored")
        with contextlib.nullcontext() if into is None else made_beside(into) as place, cls(place, base=kind) as bank:
            for source in banks:
                bank.merge(source, chains=chains)
        return bank if into is None else cls.open(into, verify=False)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries: all of a bank in memory; of a durable one the table of contents.

        Plain containers and tensors only, so that ``torch.load(weights_only=True)`` reads it.
        """
        with self._guard:
            manifest = Manifest(self._catalog).to_json()
            if not isinstance(self._store, MemoryStore):
                return {"manifest": manifest, "samples": None}
            return {"manifest": manifest, **self._store.state(self._catalog)}

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
        if not isinstance(state, Mapping) or set(state) - {"base"} != {"manifest", "samples"}:
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
                self._adopt_memory(known, state, own if chains is not None else {*own, *self._catalog.arrivals})
            else:
                self._resume(self._store, known, own)
