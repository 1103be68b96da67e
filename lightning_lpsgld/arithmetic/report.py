"""An account of layers in words: how many run in integers, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

__all__ = ["ProductAccount", "summary"]


class ProductAccount:
    """How the products of each layer ran, counted over one pass; a layer may multiply several times in it.

    Example:
        >>> account = ProductAccount()
        >>> for how in ("integer", "its input is not a rounded activation", "integer"):
        ...     account.note("shared", how)
        >>> account.note("other", "integer")
        >>> account.report()
        {'shared': 'its input is not a rounded activation (2 of its 3 products in integers)', 'other': 'integer'}
    """

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._stale: set[str] = set()

    def begin(self) -> None:
        """A new pass: what is known of a layer holds until it multiplies again."""
        self._stale = set(self._counts)

    def note(self, name: str, how: str) -> None:
        """Count a product of a layer: ``"integer"``, or why it was simulated."""
        if name in self._stale or name not in self._counts:
            self._stale.discard(name)
            self._counts[name] = Counter()
        self._counts[name][how] += 1

    def report(self) -> dict[str, str]:
        """Layer -> ``"integer"`` if all of its products were, else why not."""
        return {name: _in_words(counts) for name, counts in self._counts.items()}


def _in_words(counts: Counter[str]) -> str:
    reasons = [how for how, _ in counts.most_common() if how != "integer"]
    if not reasons:
        return "integer"
    done = counts["integer"]
    return f"{reasons[0]} ({done} of its {counts.total()} products in integers)" if done else reasons[0]


def summary(report: Mapping[str, str]) -> str:
    """How many layers ran how, with the reasons.

    Args:
        report: Layer name to ``"integer"`` or the reason why not.

    Returns:
        One line.

    Example:
        >>> summary({"a": "integer", "b": "its input is not a rounded activation", "c": "integer"})
        '2 of 3 layers in integers; 1 simulated: its input is not a rounded activation (b)'
    """
    reasons = Counter(how for how in report.values() if how != "integer")
    parts = [f"{len(report) - reasons.total()} of {len(report)} layers in integers"]
    for reason, count in reasons.most_common():
        names = [name for name, how in report.items() if how == reason]
        shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
        parts.append(f"{count} simulated: {reason} ({shown})")
    return "; ".join(parts)
