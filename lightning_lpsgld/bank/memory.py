"""Samples in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lpsgld.bank.base import Base
from lightning_lpsgld.bank.catalog import Catalog, Change
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.records import Record, sample_name
from lightning_lpsgld.bank.sample import Sample, SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec
from lightning_lpsgld.bank.tensors import check_base_tensors, check_tensors, packed, unpacked

__all__ = ["MemoryStore"]


class MemoryStore:
    """Tensors in CPU memory."""

    def __init__(self) -> None:
        self.location: str | None = None
        self.unlisted: list[str] = []
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.base_tensors: dict[str, Tensor] = {}
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

    def write(self, info: SampleInfo, spec: ModuleSpec, tensors: dict[str, Tensor], base: Base | None) -> Record:
        """Keep the tensors, packed; the "checksum" of the name is a running number."""
        self._count += 1
        tensors = packed(tensors, spec)
        size = sum(tensor.nbytes for tensor in tensors.values()) + 1
        record = Record(info, sample_name(info, f"{self._count:040x}"), size)
        self.tensors[record.file] = tensors
        return record

    def read(self, record: Record, spec: ModuleSpec, base: Base | None) -> dict[str, Tensor]:
        """The kept tensors."""
        return unpacked(self.tensors[record.file], spec, record.file)

    def check(self, record: Record, spec: ModuleSpec, *, content: bool) -> str | None:
        """Memory is not damaged."""
        return None

    def is_whole(self, record: Record, spec: ModuleSpec) -> bool:
        """Whether a sample takes nothing from the base."""
        return len(self.tensors[record.file]) == len(spec.stored)

    # ----------------------------------------------------------------------------------------------------- the base

    def write_base(self, base: Base, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Base:
        """Keep the tensors of a base that is stored."""
        self.base_tensors = dict(tensors) if base.kind == "stored" else {}
        return Base(base.kind, base.digests)

    def read_base(self, base: Base, spec: ModuleSpec) -> dict[str, Tensor]:
        """The kept tensors."""
        return self.base_tensors

    def check_base(self, base: Base, spec: ModuleSpec, *, content: bool) -> str | None:
        """Memory is not damaged."""
        return None

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state(self, catalog: Catalog) -> dict[str, Any]:
        """Tensors of every sample that ``catalog`` names, in its order, and those of the base."""
        state: dict[str, Any] = {"samples": [dict(self.tensors[r.file]) for r in catalog.records.values()]}
        return state if catalog.base is None else {**state, "base": dict(self.base_tensors)}

    def adopt(self, catalog: Catalog, state: Mapping[str, Any], base: Base | None) -> tuple[list[Record], Base | None]:
        """Inverse of :meth:`state`: keep these tensors beside those that are here, under new names.

        Args:
            catalog: The table of contents in the state.
            state: What :meth:`state` returned.
            base: Base of the samples that are here, if they have one; else that of the state is taken.

        Returns:
            Records of the samples, and the base they are kept beside.

        Raises:
            BankError: If the tensors are not what ``catalog`` describes; nothing is kept then.
        """
        records, samples, spec = list(catalog.records.values()), state["samples"], catalog.spec
        if not isinstance(samples, list) or len(samples) != len(records):
            raise BankError("The state of a sample bank does not hold as many samples as its manifest names.")
        if spec is None:
            return [], base
        theirs = _own_copies(state.get("base", {}))
        if catalog.base is not None and catalog.base.kind == "stored":
            check_base_tensors(theirs, spec, catalog.base, "The base in the state of a sample bank")
        found = []
        for record, tensors in zip(records, samples):
            where = f"The sample of chain {record.info.chain}, step {record.info.step}"
            own = unpacked(_own_copies(tensors), spec, where)
            check_tensors(own, spec, where, catalog.base)
            found.append(Sample.of(record.info, spec, own, catalog.base, theirs))
        beside = base or catalog.base
        kept = [sample.beside(beside) for sample in found]
        if base is None and beside is not None:
            beside = self.write_base(beside, spec, theirs)
        return [self.write(s.info, spec, own, beside) for s, own in zip(found, kept)], beside

    def save(self, catalog: Catalog) -> None:
        """Nothing to do: the caller's catalog is the truth."""

    def append(self, catalog: Catalog, change: Change) -> None:
        """Nothing to do: the caller's catalog is the truth."""

    def clean(self, catalog: Catalog) -> None:
        """Drop tensors that are no sample's any more."""
        for file in catalog.removed:
            self.tensors.pop(file, None)
        catalog.removed.clear()


def _own_copies(tensors: object) -> dict[str, Tensor]:
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise BankError("A sample in the state of a sample bank is not a mapping of tensors.")
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
