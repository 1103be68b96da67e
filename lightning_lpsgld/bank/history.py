"""What happens to a bank's table of contents, as functions from manifest to manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.manifest import Manifest, Record
from lightning_lpsgld.bank.retention import kept_arrivals
from lightning_lpsgld.bank.sample import SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec

__all__ = [
    "check_same_module",
    "check_same_retention",
    "from_records",
    "keeps",
    "merged_labels",
    "restricted",
    "truncated",
    "with_arrival",
    "with_record",
]


def _kept_steps(manifest: Manifest, chain: int, steps: tuple[int, ...]) -> set[int]:
    kept = kept_arrivals(len(steps), manifest.capacity, manifest.policy, seed=manifest.seed, chain=chain)
    return {steps[n] for n in kept}


def check_same_module(manifest: Manifest, spec: ModuleSpec) -> None:
    """Raise :class:`BankError` if the bank has samples of another module or of other formats."""
    if manifest.spec is not None and manifest.spec.fingerprint != spec.fingerprint:
        raise BankError(
            f"The bank holds samples of another module or of other formats: {manifest.spec.difference(spec)}. "
            "Use a bank of its own for each."
        )


def check_same_retention(manifest: Manifest, other: Manifest) -> None:
    """Raise :class:`BankError` if two banks differ in capacity, policy or seed."""
    ours, theirs = ((m.capacity, m.policy, m.seed) for m in (manifest, other))
    if ours != theirs:
        raise BankError(
            f"The bank was made with (capacity, policy, seed) = {theirs}, not {ours}. Use the same, or a new bank."
        )


def with_arrival(manifest: Manifest, info: SampleInfo) -> Manifest:
    """Note that a sample was offered, and drop what the policy discards in its favour."""
    steps = manifest.arrivals.get(info.chain, ())
    if info.step not in steps:
        steps = (*steps, info.step)
    kept = _kept_steps(manifest, info.chain, steps)
    records = tuple(r for r in manifest.records if r.info.chain != info.chain or r.info.step in kept)
    return replace(manifest, records=records, arrivals={**manifest.arrivals, info.chain: steps})


def keeps(manifest: Manifest, info: SampleInfo) -> bool:
    """Whether the policy keeps a sample that :func:`with_arrival` has noted."""
    return info.step in _kept_steps(manifest, info.chain, manifest.arrivals[info.chain])


def with_record(manifest: Manifest, record: Record) -> Manifest:
    """Put a record in the place of the one with its chain and step, or at the end."""
    places = {old.key: n for n, old in enumerate(manifest.records)}
    records = list(manifest.records)
    if record.key in places:
        records[places[record.key]] = record
    else:
        records.append(record)
    return replace(manifest, records=tuple(records))


def restricted(manifest: Manifest, arrivals: Mapping[int, tuple[int, ...]]) -> Manifest:
    """Forget every sample that is not in ``arrivals``."""
    offered = {(chain, step) for chain, steps in arrivals.items() for step in steps}
    records = tuple(record for record in manifest.records if record.key in offered)
    return replace(manifest, records=records, arrivals=dict(arrivals))


def truncated(manifest: Manifest, step: int) -> Manifest:
    """Forget every sample after ``step``."""
    arrivals = {chain: tuple(s for s in steps if s <= step) for chain, steps in manifest.arrivals.items()}
    return restricted(manifest, {chain: steps for chain, steps in arrivals.items() if steps})


def from_records(records: Iterable[Record], spec: ModuleSpec) -> Manifest:
    """Manifest of samples that were found without one, ordered by step and chain."""
    unique = {record.key: record for record in records}
    ordered = sorted(unique.values(), key=lambda record: (record.info.step, record.info.chain))
    arrivals: dict[int, tuple[int, ...]] = {}
    for record in ordered:
        arrivals[record.info.chain] = (*arrivals.get(record.info.chain, ()), record.info.step)
    return Manifest(spec=spec, records=tuple(ordered), arrivals=arrivals)


def merged_labels(manifest: Manifest, infos: Iterable[SampleInfo], chains: str) -> dict[int, int]:
    """New label of every chain among ``infos`` when they are merged into ``manifest``.

    Raises:
        BankError: If ``chains`` is unknown, or with ``"keep"`` a sample of the same chain and step is there already.
    """
    if chains not in ("keep", "renumber"):
        raise BankError(f"`chains` must be 'keep' or 'renumber', got {chains!r:.80}.")
    keys = {(info.chain, info.step) for info in infos}
    labels = sorted({chain for chain, _ in keys})
    if chains == "renumber":
        first = max(manifest.arrivals, default=-1) + 1
        return {chain: first + n for n, chain in enumerate(labels)}
    both = keys & {record.key for record in manifest.records}
    if both:
        chain, step = min(both)
        raise BankError(
            f"Both banks have a sample of chain {chain}, step {step}. Use chains='renumber' if they come from "
            "independent runs."
        )
    return {chain: chain for chain in labels}
