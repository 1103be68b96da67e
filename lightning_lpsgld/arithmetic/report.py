"""An account of layers in words: how many run in integers, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

__all__ = ["summary"]


def summary(report: Mapping[str, str]) -> str:
    """How many layers ran how, with the reasons.

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
