"""Codes that stand for a weight: shared by the weight and its views, read and written whole or row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.formats import FormatLike, NumberFormat
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.functional import encode
from lightning_lpsgld.ops.stored import StoredCodes

__all__ = ["CodeCell"]

#: Elements that are decoded, moved and encoded at once: little memory, and work enough to pay for the calls.
_RUN = 2**19


class CodeCell:
    """Codes and exponents that stay where they are while their values change.

    Args:
        codes: In dense memory of any order; taken, or packed where they have fewer than 8 bits.

    Attributes:
        stored: The codes.
        version: Number of times the values were set.
        finer: The same values rounded to a finer grid, which are set with these: what a sum of the weight's steps is to
            begin at, until a sampler takes it.
        follows: Whether they are set with these; DDP sets each weight to what it reads of it.
    """

    __slots__ = ("_open", "finer", "follows", "stored", "version")

    def __init__(self, codes: Encoded | StoredCodes) -> None:
        self.stored = StoredCodes.of(codes) if isinstance(codes, Encoded) else codes
        self.version = 0
        self.finer: CodeCell | None = None
        self.follows = True
        self._open: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, fmt: FormatLike, finer: FormatLike | None = None) -> CodeCell:
        """Values rounded to nearest, on a finer grid too if one is given.

        Raises:
            TypeError, ValueError: As :func:`~lightning_lpsgld.ops.encode`.
        """
        cell = cls(encode(values, fmt))
        if finer is not None:
            cell.finer = cls(encode(values.to(torch.promote_types(values.dtype, torch.float32)), finer))
        return cell

    @property
    def format(self) -> NumberFormat:
        """The grid."""
        return self.stored.format

    @property
    def divisible(self) -> bool:
        """Whether rows (indices of dim 0) can be read and written without the others."""
        return self._open is None and self.stored.divisible

    def runs(self, *formats: NumberFormat | None, beside: CodeCell | None = None) -> list[tuple[int, int]]:
        """Ranges of rows that can be moved one after another, each within little memory; one range where they cannot.

        Args:
            formats: Further formats whose blocks must lie within a range.
            beside: A cell of the same shape whose rows are read together with these.
        """
        shape = self.stored.shape
        count = shape[0] if shape else 1
        if (
            not self.divisible
            or (beside is not None and not beside.divisible)
            or count == 0
            or any(fmt is not None and fmt.blocks.crosses_rows(len(shape)) for fmt in formats)
        ):
            return [(0, count)]
        step = max(cell.stored.stride_of_rows for cell in (self, beside) if cell is not None)  # powers of two
        size = max(step, _RUN // max(1, self.stored.row) // step * step)
        return [(start, min(start + size, count)) for start in range(0, count, size)]

    def around(self, first: int, last: int) -> tuple[int, int]:
        """The range of rows that has elements ``first`` to ``last`` of the memory, and that can be read by itself."""
        row, step = max(1, self.stored.row), self.stored.stride_of_rows
        start, stop = first // row // step * step, -(-(last // row + 1) // step) * step
        return start, min(stop, self.stored.shape[0])

    def values(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Values of rows [start, stop), of all by default; a new tensor in the codes' memory order, exact.

        Rows begin and end where :meth:`runs` or :meth:`around` say.
        """
        if self._open is not None:
            return self._open.to(dtype, copy=True)
        return self._chosen(start, stop).decoded(dtype)

    def set(self, values: Tensor, start: int = 0, stop: int | None = None) -> None:
        """Set rows [start, stop), all by default, to values, rounded to nearest; exact for values on the grid.

        Raises:
            ValueError: If a value is NaN and the format has none; nothing is changed then.
        """
        new = encode(values.detach(), self.format, rounding="nearest")
        self._chosen(start, stop).write(StoredCodes.of(new))
        self.version += 1
        if self.finer is not None and self.follows:
            self.finer.set(values, start, stop)

    def _chosen(self, start: int, stop: int | None) -> StoredCodes:
        whole = stop is None or (start == 0 and stop == self.stored.shape[:1].numel())
        return self.stored if whole or stop is None else self.stored.rows(start, stop)

    def take(self, other: StoredCodes) -> None:
        """Set all to codes of the same format and shape; copied."""
        self._open = None
        self.stored.write(other)
        self.version += 1
        if self.finer is not None and self.follows:
            self.finer.set(self.values(torch.float32))

    def copied(self, device: torch.device | None = None) -> CodeCell:
        """A cell of its own with the same values, on the same or another device."""
        device = self.stored.codes.device if device is None else device
        cell = CodeCell(self.stored.copied(device))
        cell._open = None if self._open is None else self._open.to(device, copy=True)
        cell.finer = None if self.finer is None else self.finer.copied(device)
        cell.follows = self.follows
        return cell

    # ---------------------------------------------------------------------------------------- while being initialized

    def opened(self, dtype: torch.dtype) -> Tensor:
        """The values as floats that may be changed in place, until :meth:`close`; the codes are stale meanwhile."""
        if self._open is None:
            self._open = self.values(dtype)
        self.version += 1
        return self._open

    def close(self) -> None:
        """Round what was changed in place since :meth:`opened`, once, to nearest."""
        values, self._open = self._open, None
        if values is not None:
            self.set(values)
