"""A bank's table of contents, and every way in which it changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_lpsgld.bank.base import Base, BaseKind
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.records import Key, Record, Sizes
from lightning_lpsgld.bank.retention import Policy, kept_arrivals
from lightning_lpsgld.bank.sample import SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec

__all__ = ["Catalog", "Change", "check_run", "check_same_module", "from_records", "merged_labels"]

_RUN = re.compile(r"[0-9a-f]{16}")


def check_run(run: object) -> str:
    """``run`` if it is a run's id, 16 hexadecimal digits.

    Raises:
        BankError: If it is not.
    """
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        raise BankError(f"The id of a run must be 16 hexadecimal digits, got {run!r:.80}.")
    return run


@dataclass(frozen=True)
class Change:
    """What one addition, or one merge, does to the table of contents.

    Attributes:
        offered: Samples that arrived, kept or not.
        records: Those that are kept; one with a key that is there replaces it.
        dropped: Samples that the policy discards in their favour.
    """

    offered: tuple[Key, ...] = ()
    records: tuple[Record, ...] = ()
    dropped: tuple[Key, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain form."""
        samples = [record.to_json() for record in self.records]
        return {
            "offered": [list(k) for k in self.offered],
            "samples": samples,
            "dropped": [list(k) for k in self.dropped],
        }

    @classmethod
    def from_json(cls, data: object, sizes: Sizes) -> Change:
        """Inverse of :meth:`to_json`.

        Raises:
            BankError: If ``data`` is malformed.
        """
        if not isinstance(data, dict) or set(data) != {"offered", "samples", "dropped"}:
            raise BankError("A line of the journal must have the fields `offered`, `samples` and `dropped`.")
        if not isinstance(data["samples"], list):
            raise BankError("`samples` in a line of the journal must be a list.")
        records = tuple(Record.from_json(sample, sizes) for sample in data["samples"])
        return cls(_keys(data["offered"]), records, _keys(data["dropped"]))


def _keys(data: object) -> tuple[Key, ...]:
    if not isinstance(data, list) or not all(isinstance(key, list) and len(key) == 2 for key in data):
        raise BankError("A line of the journal must name samples as [chain, step].")
    if not all(type(number) is int and 0 <= number < 2**63 for key in data for number in key):
        raise BankError("A chain or step in a line of the journal is not an int in [0, 2**63).")
    return tuple((chain, step) for chain, step in data)


@dataclass
class Catalog:
    """Everything about a bank but the tensors.

    Attributes:
        spec: The module's description; ``None`` until the first sample.
        records: The samples by chain and step, in the order in which they arrived.
        arrivals: Per chain, the steps of all samples that were offered, kept or not.
        capacity: Most samples kept per chain, or ``None``.
        policy: What a full bank does.
        seed: Seed of the reservoir.
        runs: Per chain, the id of the run that writes it, where one has said so.
        removed: Files of samples that were discarded and may still lie about.
        recovered: Whether capacity, policy and seed are unknown, because they were lost with the manifest.
        base: Tensors that samples leave out; ``None`` as long as there are none.
        kind: What becomes of such tensors when there are some.
    """

    spec: ModuleSpec | None = None
    records: dict[Key, Record] = field(default_factory=dict)
    arrivals: dict[int, list[int]] = field(default_factory=dict)
    capacity: int | None = None
    policy: Policy = "thin"
    seed: int = 0
    runs: dict[int, str] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    recovered: bool = False
    base: Base | None = None
    kind: BaseKind = "stored"

    def __post_init__(self) -> None:
        self._offered = {chain: set(steps) for chain, steps in self.arrivals.items()}

    def copied(self) -> Catalog:
        """A copy that changes by itself; records are shared."""
        other = copy.copy(self)
        other.records, other.runs, other.removed = dict(self.records), dict(self.runs), set(self.removed)
        other.arrivals = {chain: list(steps) for chain, steps in self.arrivals.items()}
        other._offered = {chain: set(steps) for chain, steps in self._offered.items()}
        return other

    @property
    def retention(self) -> tuple[int | None, Policy, int]:
        """Capacity, policy, seed."""
        return self.capacity, self.policy, self.seed

    @property
    def files(self) -> set[str]:
        """Names of the files that are samples of this bank."""
        return {record.file for record in self.records.values()}

    # ---------------------------------------------------------------------------------------------------- additions

    def planned(self, infos: Sequence[SampleInfo]) -> tuple[Change, set[Key]]:
        """What offering samples does, before they are written, and which of them are kept."""
        offered, kept, dropped = [], set(), []
        for chain in dict.fromkeys(info.chain for info in infos):
            steps = list(dict.fromkeys(info.step for info in infos if info.chain == chain))
            known = self._offered.get(chain, ())
            offered += [(chain, step) for step in steps if step not in known]
            stay = self._kept_steps(chain, [step for step in steps if step not in known])
            kept |= {(chain, step) for step in steps if step in stay}
            dropped += [] if stay is _EVERYTHING else [k for k in self.records if k[0] == chain and k[1] not in stay]
        return Change(tuple(offered), (), tuple(dropped)), kept

    def _kept_steps(self, chain: int, new: list[int]) -> Container[int]:
        old = self.arrivals.get(chain, [])
        if self.capacity is None or len(old) + len(new) <= self.capacity:
            return _EVERYTHING
        numbers = kept_arrivals(len(old) + len(new), self.capacity, self.policy, seed=self.seed, chain=chain)
        return {old[n] if n < len(old) else new[n - len(old)] for n in numbers}

    def keeps(self, chain: int, step: int) -> bool:
        """Whether the policy keeps a sample of what has been offered so far."""
        return step in self._kept_steps(chain, [])

    def apply(self, change: Change) -> None:
        """Make the change; what is discarded goes into :attr:`removed`."""
        for chain, step in change.offered:
            if step not in self._offered.setdefault(chain, set()):
                self._offered[chain].add(step)
                self.arrivals.setdefault(chain, []).append(step)
        for key in change.dropped:
            if key in self.records:
                self.removed.add(self.records.pop(key).file)
        for record in change.records:
            if record.key in self.records:
                self.removed.add(self.records[record.key].file)
            self.records[record.key] = record
            self.removed.discard(record.file)

    def check_complete(self) -> None:
        """Raise :class:`BankError` if a sample was never offered, or there are more of a chain than are kept."""
        for chain, step in self.records:
            if step not in self._offered.get(chain, ()):
                raise BankError(f"A sample of chain {chain}, step {step}, is missing from `arrivals`.")

    # ---------------------------------------------------------------------------------------------------- cutting back

    def cut(self, arrivals: dict[int, list[int]], chains: Iterable[int]) -> list[Record]:
        """Forget every sample of ``chains`` that is not in ``arrivals``, which then are theirs; what was forgotten."""
        gone = []
        for chain in dict.fromkeys(chains):
            steps = arrivals.get(chain, [])
            offered = set(steps)
            gone += [r for key, r in self.records.items() if key[0] == chain and key[1] not in offered]
            self.arrivals.pop(chain, None), self._offered.pop(chain, None)
            if steps:
                self.arrivals[chain], self._offered[chain] = list(steps), offered
        for record in gone:
            self.removed.add(self.records.pop(record.key).file)
        return gone

    def truncated_arrivals(self, step: int, chains: Iterable[int]) -> dict[int, list[int]]:
        """Arrivals of ``chains`` up to ``step``."""
        return {chain: [s for s in self.arrivals.get(chain, []) if s <= step] for chain in chains}

    # ------------------------------------------------------------------------------------------------------- runs

    def check_same_retention(self, other: Catalog, *, here: str = "The bank") -> None:
        """Raise :class:`BankError` if two banks differ in capacity, policy or seed, and both are known."""
        if self.retention != other.retention and not (self.recovered or other.recovered):
            raise BankError(
                f"{here} was made with (capacity, policy, seed) = {other.retention}, not {self.retention}. Use the "
                "same, or a new bank."
            )

    def adopt_retention(self, other: Catalog) -> None:
        """Take the other's capacity, policy and seed if these were lost."""
        if self.recovered and not other.recovered:
            self.capacity, self.policy, self.seed = other.retention
            self.recovered = False

    def check_runs(self, run: str, chains: Iterable[int], location: str | None) -> None:
        """Raise :class:`BankError` if one of ``chains`` is another run's."""
        for chain in chains:
            owner = self.runs.get(chain, run)
            if owner != run:
                raise BankError(
                    f"Chain {chain} of the bank {'in memory' if location is None else f'at {location}'} is that of run "
                    f"{owner}, and this is run {run}: their samples are not mixed. Give the path of this run's bank, "
                    "or start a new run there with `append=True`."
                )


class _Everything(Container[int]):
    def __contains__(self, item: object) -> bool:
        return True


_EVERYTHING = _Everything()


def check_same_module(catalog: Catalog, spec: ModuleSpec) -> None:
    """Raise :class:`BankError` if the bank has samples of another module or of other formats."""
    ours = catalog.spec
    if ours is not None and ours is not spec and ours.fingerprint != spec.fingerprint:
        raise BankError(
            f"The bank holds samples of another module or of other formats: {ours.difference(spec)}. "
            "Use a bank of its own for each."
        )


def from_records(records: Iterable[Record], spec: ModuleSpec) -> Catalog:
    """Table of contents of samples that were found without one, ordered by step and chain."""
    unique = {record.key: record for record in records}
    ordered = sorted(unique.values(), key=lambda record: (record.info.step, record.info.chain))
    catalog = Catalog(spec=spec, recovered=True)
    catalog.apply(Change(tuple(record.key for record in ordered), tuple(ordered)))
    return catalog


def merged_labels(catalog: Catalog, other: Catalog, infos: Iterable[SampleInfo], chains: str) -> dict[int, int]:
    """New label of every chain among ``infos`` when they are merged from ``other`` into ``catalog``.

    Raises:
        BankError: If ``chains`` is unknown, or with ``"keep"`` a sample of the same chain and step is there already,
            or a chain is one run's here and another's there.
    """
    if chains not in ("keep", "renumber"):
        raise BankError(f"`chains` must be 'keep' or 'renumber', got {chains!r:.80}.")
    keys = {(info.chain, info.step) for info in infos}
    labels = sorted({chain for chain, _ in keys})
    if chains == "renumber":
        first = max(max(catalog.arrivals, default=-1), max(catalog.runs, default=-1)) + 1
        return {chain: first + n for n, chain in enumerate(labels)}
    both = keys & catalog.records.keys()
    if both:
        chain, step = min(both)
        raise BankError(
            f"Both banks have a sample of chain {chain}, step {step}. Use chains='renumber' if they come from "
            "independent runs."
        )
    for chain in labels:
        ours, theirs = catalog.runs.get(chain), other.runs.get(chain)
        if ours is not None and theirs is not None and ours != theirs:
            raise BankError(
                f"Chain {chain} is that of run {ours} in one bank and of run {theirs} in the other. Use "
                "chains='renumber'."
            )
    return {chain: chain for chain in labels}
