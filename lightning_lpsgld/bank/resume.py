"""What a run that resumes does to the chains that are its own, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from lightning_lpsgld.bank.catalog import Catalog, check_same_module
from lightning_lpsgld.bank.records import Key, Record, parse_sample_name
from lightning_lpsgld.bank.spec import ModuleSpec

__all__ = ["readopted", "resume_report", "without_samples_after"]


def without_samples_after(
    catalog: Catalog, arrivals: dict[int, list[int]], chains: Collection[int], unlisted: Iterable[str]
) -> tuple[Catalog | None, list[Record]]:
    """The catalog without samples of ``chains`` that are not in ``arrivals``, or ``None`` if nothing changes.

    Files that no catalog names go by the same rule.

    Returns:
        The new catalog, and what it dropped.
    """
    after = catalog.copied()
    gone = after.cut(arrivals, chains)
    for name in unlisted:
        parsed = parse_sample_name(name)
        if parsed is not None and parsed[0] in chains and parsed[1] not in arrivals.get(parsed[0], ()):
            after.removed.add(name)
    return (after if after != catalog else None), gone


def readopted(
    catalog: Catalog, known: Catalog, chains: Collection[int], intact: Callable[[Record, ModuleSpec], bool]
) -> None:
    """Take back samples of ``chains`` that a checkpoint knew, if their files are there and intact.

    They are there where the journal lost its end after the checkpoint was written.
    """
    if known.spec is None:
        return
    check_same_module(catalog, known.spec)
    if known.base is not None and not known.base.same_tensors(catalog.base):
        return  # what these samples left out is not what this bank has
    for key, record in known.records.items():
        if key[0] in chains and key not in catalog.records and intact(record, known.spec):
            catalog.spec = known.spec
            catalog.records[key] = record
            catalog.removed.discard(record.file)


def resume_report(
    before: Catalog,
    known: Catalog,
    chains: Collection[int],
    dropped: list[Record],
    usable: Collection[Key],
    location: str | None,
) -> list[str]:
    """Sentences about what was dropped and what is missing, with counts; none if the bank was as the checkpoint.

    Args:
        before: The bank's contents before it was cut back.
        known: Its contents at the checkpoint.
        chains: The run's own chains.
        dropped: What was cut off.
        usable: Samples that are there now.
        location: Where the bank is.
    """
    report = []
    if dropped:
        steps = [record.info.step for record in dropped]
        others = sum(key[0] not in chains for key in usable)
        report.append(
            f"Resuming: {len(dropped)} samples of chains {sorted({r.info.chain for r in dropped})} were dropped from "
            f"the bank at {location}, because they came after the checkpoint (steps {min(steps)} to {max(steps)}); the "
            f"run takes them again. {others} samples of other chains were left alone."
        )
    expected = {key for key in known.records if key[0] in chains and not _discarded(before, key)}
    gone = sorted(expected.difference(usable))
    if gone:
        more = f" and {len(gone) - 10} more" if len(gone) > 10 else ""
        report.append(
            f"The bank at {location} lacks samples (chain, step) that the checkpoint knew: {gone[:10]}{more}. "
            f"{len(gone)} of {len(expected)} are gone; the run goes on without them."
        )
    return report


def _discarded(before: Catalog, key: Key) -> bool:
    """Whether the bank's policy had dropped this sample, since the checkpoint, in favour of later ones."""
    chain, step = key
    offered = before.arrivals.get(chain, [])
    return step in offered and key not in before.records and not before.keeps(chain, step)
