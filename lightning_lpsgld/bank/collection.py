"""The bank itself: posterior samples that are added once and read often."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.folder import open_folder
from lightning_lpsgld.bank.history import (
    check_same_module,
    check_same_retention,
    keeps,
    merged_labels,
    restricted,
    truncated,
    with_arrival,
    with_record,
)
from lightning_lpsgld.bank.manifest import MANIFEST, Manifest, Record
from lightning_lpsgld.bank.retention import Policy, check_retention
from lightning_lpsgld.bank.sample import Damage, Sample, SampleInfo, encode_tensors
from lightning_lpsgld.bank.spec import Formats, ModuleSpec, formats_by_name, module_tensors
from lightning_lpsgld.bank.store import FileStore, MemoryStore

__all__ = ["SampleBank"]

log = logging.getLogger(__name__)


class SampleBank:
    r"""Posterior samples of one module, as codes and exponents; in memory or in a directory that survives crashes.

    A parameter on the grid of a format is stored as integer codes (and exponents, per block), losslessly; everything
    else (BatchNorm statistics, float32 parameters, counters) as it is; tied weights once. Loading copies values back
    and rounds nothing.

    A directory holds one safetensors file per sample, named after chain, step and checksum, and ``manifest.json``.
    A sample is written to a temporary file, synced and renamed, then the manifest is, so that a crash at any moment
    leaves the bank as it was before or after the call. No pickle is written or read.

    **Where the promise stops.** One writer per directory: a second one is noticed and refused, but not in every race.
    Codes below 8 bits take a byte each. What modules keep outside parameters and persistent buffers
    (``get_extra_state``) is not stored.

    Args:
        path: Directory of a new bank, or an address that fsspec knows (``"s3://..."``; see
            :class:`~lightning_lpsgld.bank.folder.RemoteFolder` for what is promised there). ``None``: in memory.
        capacity: Most samples kept **per chain**; ``None``: all.
        policy: What a full bank does: ``"thin"`` keeps every 2nd, 4th, ... so that samples stay spread over the whole
            chain; ``"reservoir"`` a uniform random subset; ``"last"`` the newest.
        seed: Seed of the reservoir's draws.
        exist_ok: Continue the bank that is at ``path`` already; its capacity, policy and seed must be those given.

    Raises:
        BankError: If a bank is there already and ``exist_ok`` is not set, or an argument is out of range.

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
        self._manifest = Manifest(capacity=capacity, policy=policy, seed=seed)
        self._damaged: dict[str, str] = {}
        self._store: MemoryStore | FileStore = MemoryStore()
        if path is not None:
            store = FileStore(open_folder(path))
            self._manifest = store.start(self._manifest, exist_ok=exist_ok)
            self._store = store
            self.verify()

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
        bank._store, bank._manifest = store, store.load_manifest()
        bank.verify(content=verify)
        return bank

    @classmethod
    def recover(cls, path: str | os.PathLike[str]) -> SampleBank:
        """Rebuild a lost or altered manifest from the sample files, each of which describes itself, and open the bank.

        Samples are ordered by step and chain. Files that do not match their own checksum are left where they are and
        are not named by the new manifest; capacity and the history of rejected samples are not recovered.

        Raises:
            BankError: If there is no intact sample, or there are samples of different modules.
        """
        FileStore(open_folder(path)).rebuild()
        return cls.open(path)

    @property
    def path(self) -> str | None:
        """Where the bank is; ``None`` in memory."""
        return self._store.location

    @property
    def fingerprint(self) -> str | None:
        """Hash of the module's names, shapes, dtypes and formats; ``None`` while the bank is empty."""
        return None if self._manifest.spec is None else self._manifest.spec.fingerprint

    @property
    def spec(self) -> ModuleSpec | None:
        """The module's description; ``None`` while the bank is empty."""
        return self._manifest.spec

    @property
    def _usable(self) -> list[Record]:
        return [record for record in self._manifest.records if record.file not in self._damaged]

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
        broken = (record for record in self._manifest.records if record.file in self._damaged)
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
        for record in self._usable:
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
            BankError: If a value is not on its grid, the module or its formats differ from those in the bank, or the
                metadata is malformed. The bank is then unchanged.
        """
        info = SampleInfo(step, cycle, chain, temperature, lr, metrics or {})
        tensors = module_tensors(source) if isinstance(source, nn.Module) else dict(source)
        spec = ModuleSpec.of(tensors, formats_by_name(tensors, formats))
        check_same_module(self._manifest, spec)
        manifest = with_arrival(self._manifest, info)
        kept = keeps(manifest, info)
        if kept:
            record = self._store.write(info, spec, encode_tensors(tensors, spec))
            manifest = with_record(replace(manifest, spec=spec), record)
            self._damaged.pop(record.file, None)
        self._commit(manifest)
        return info if kept else None

    def _commit(self, manifest: Manifest) -> None:
        self._store.commit(manifest)
        self._manifest = manifest
        self._damaged = {r.file: self._damaged[r.file] for r in manifest.records if r.file in self._damaged}

    def verify(self, *, content: bool = True) -> list[Damage]:
        """Check every file again.

        Args:
            content: Compare checksums; otherwise sizes only.

        Returns:
            The damaged samples, also kept as :attr:`damaged`.
        """
        spec = self.spec
        for record in self._manifest.records:
            reason = None if spec is None else self._store.check(record, spec, content=content)
            self._damaged.pop(record.file, None)
            if reason is not None:
                self._damaged[record.file] = reason
                log.warning("Sample of chain %d, step %d is left out: %s", *record.key, reason)
        return self.damaged

    def truncate(self, step: int) -> int:
        """Drop all samples taken after ``step``: what a run that resumes from a checkpoint at ``step`` has to do.

        With the samples of the repeated steps added again, the bank is that of an uninterrupted run, whatever its
        policy. (Until those steps are repeated, samples that a full bank had already discarded stay missing.)

        Returns:
            How many samples were dropped.
        """
        return self._replace_manifest(truncated(self._manifest, step))

    def _replace_manifest(self, manifest: Manifest) -> int:
        dropped = len(self._manifest.records) - len(manifest.records)
        if manifest != self._manifest:
            self._commit(manifest)
        return dropped

    def merge(self, other: SampleBank, *, chains: Literal["keep", "renumber"] = "keep") -> None:
        """Add all samples of another bank of the same module.

        Args:
            other: The bank to read; not changed.
            chains: ``"keep"`` takes its chain labels, ``"renumber"`` numbers its chains after those of this bank.

        Raises:
            BankError: If the modules or formats differ, or with ``"keep"`` both banks have a sample of the same chain
                and step.
        """
        if other.spec is None:
            return
        check_same_module(self._manifest, other.spec)
        labels = merged_labels(self._manifest, other.infos, chains)
        manifest = self._manifest
        for sample in other:
            info = replace(sample.info, chain=labels[sample.chain])
            manifest = with_arrival(manifest, info)
            if keeps(manifest, info):
                record = self._store.write(info, sample.spec, dict(sample.tensors))
                manifest = with_record(replace(manifest, spec=sample.spec), record)
                self._damaged.pop(record.file, None)
        self._commit(manifest)

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

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries: all of a bank in memory; of a durable one the table of contents.

        Plain containers and tensors only, so that ``torch.load(weights_only=True)`` reads it.
        """
        if not isinstance(self._store, MemoryStore):
            return {"manifest": self._manifest.to_json(), "samples": None}
        return {"manifest": self._manifest.to_json(), "samples": self._store.state(self._manifest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the bank that the checkpoint knew.

        In memory, its samples replace those that are here. A durable bank drops every sample that came after the
        checkpoint (see :meth:`truncate`); one that the checkpoint knew and that is gone is logged as a warning.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            BankError: If it is malformed, of a bank of another kind, capacity or policy, or of another module.
        """
        if not isinstance(state, Mapping) or set(state) != {"manifest", "samples"}:
            raise BankError("The state of a sample bank must have `manifest` and `samples`.")
        manifest = Manifest.from_json(state["manifest"])
        check_same_retention(self._manifest, manifest)
        if (state["samples"] is None) == isinstance(self._store, MemoryStore):
            raise BankError("A bank in memory and one in a directory cannot resume from each other's checkpoint.")
        if isinstance(self._store, MemoryStore):
            self._store, self._manifest = MemoryStore.from_state(manifest, state["samples"]), manifest
            return
        if manifest.spec is not None:
            check_same_module(self._manifest, manifest.spec)
        self._replace_manifest(restricted(self._manifest, manifest.arrivals))
        usable = {record.key for record in self._usable}
        gone = sorted(record.key for record in manifest.records if record.key not in usable)
        if gone and manifest.capacity is None:
            log.warning("The bank at %s lacks samples (chain, step) that the checkpoint knew: %s", self.path, gone)
