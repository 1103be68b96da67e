"""The table that the examples of single tasks print: one line a method, one column a score."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["score_table"]


def score_table(
    rows: dict[str, dict[str, float]], columns: Sequence[str], label: int = 26, width: int = 15, digits: int = 4
) -> str:
    """Text: scores that a row lacks are left blank; then its samples, bytes a sample, and seconds."""
    lines = [f"{'':<{label}}" + "".join(f"{name:>{width}}" for name in (*columns, "size", "bytes", "seconds"))]
    for name, row in rows.items():
        cells = "".join(f"{row[c]:{width}.{digits}f}" if c in row else f"{'':>{width}}" for c in columns)
        lines.append(
            f"{name:<{label}}{cells}{row['size']:{width}.0f}{row['bytes']:{width}.0f}{row['seconds']:{width}.1f}"
        )
    return "\n".join(lines)
