"""Codes that stand for a weight: shared by the weight and its views, read and written whole or row by row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.functional import decode, encode

__all__ = ["CodeCell"]

#: Elements that are decoded, moved and encoded at once: little memory, and work enough to pay for the calls.
_RUN = 2**19


class CodeCell:
    """Codes and exponents that stay where they are while their values change.

    Args:
        encoded: Codes in dense memory of any order; taken, not copied.

    Attributes:
        version: Number of times the values were set.
    """

    __slots__ = ("_open", "encoded", "version")

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded
        self.version = 0
        self._open: Tensor | None = None

    @property
    def format(self) -> NumberFormat:
        """The grid."""
        return self.encoded.format

    @property
    def divisible(self) -> bool:
        """Whether rows (indices of dim 0) can be read and written without the others."""
        ndim = self.encoded.codes.ndim
        return ndim > 0 and self._open is None and not self.format.blocks.crosses_rows(ndim)

    def rows(self, start: int, stop: int) -> Encoded:
        """Codes of rows [start, stop), sharing memory; only of what is :attr:`divisible`."""
        exponents = self.encoded.exponents
        exponents = None if exponents is None else exponents[start:stop]
        return Encoded(self.encoded.codes[start:stop], exponents, self.format)

    def runs(self, *formats: NumberFormat | None) -> list[tuple[int, int]]:
        """Ranges of rows that can be moved one after another, each within little memory; one range where they cannot.

        Args:
            formats: Further formats whose blocks must lie within a range.
        """
        codes = self.encoded.codes
        count = codes.shape[0] if codes.ndim else 1
        if (
            not self.divisible
            or count == 0
            or any(fmt is not None and fmt.blocks.crosses_rows(codes.ndim) for fmt in formats)
        ):
            return [(0, count)]
        size = max(1, _RUN // max(1, codes.numel() // count))
        return [(start, min(start + size, count)) for start in range(0, count, size)]

    def values(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Values of rows [start, stop), of all by default; a new tensor in the codes' memory order, exact."""
        if self._open is not None:
            return self._open.to(dtype, copy=True)
        whole = start == 0 and (stop is None or stop == self.encoded.codes.shape[:1].numel())
        chosen = self.encoded if whole or stop is None else self.rows(start, stop)
        found = decode(chosen, dtype)
        if found.stride() == chosen.codes.stride():
            return found
        return torch.empty_like(chosen.codes, dtype=dtype).copy_(found)

    def set(self, values: Tensor, start: int = 0, stop: int | None = None) -> None:
        """Set rows [start, stop), all by default, to values, rounded to nearest; exact for values on the grid.

        Raises:
            ValueError: If a value is NaN and the format has none; nothing is changed then.
        """
        new = encode(values.detach(), self.format, rounding="nearest")
        chosen = self.encoded if stop is None else self.rows(start, stop)
        self._take(chosen, new)

    def take(self, other: Encoded) -> None:
        """Set all to codes of the same format and shape; copied."""
        self._open = None
        self._take(self.encoded, other)

    def _take(self, mine: Encoded, new: Encoded) -> None:
        _copy(new.codes, mine.codes)
        if mine.exponents is not None and new.exponents is not None:
            _copy(new.exponents, mine.exponents)
        self.version += 1

    def copied(self, device: torch.device | None = None) -> CodeCell:
        """A cell of its own with the same values, on the same or another device."""
        old = self.encoded
        device = old.codes.device if device is None else device
        codes = old.codes.to(device, copy=True)
        exponents = None if old.exponents is None else old.exponents.to(device, copy=True)
        cell = CodeCell(Encoded(codes, exponents, old.format))
        cell._open = None if self._open is None else self._open.to(device, copy=True)
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


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy by the calling thread: to wake others for a few hundred kilobytes takes longer where cores are busy."""
    if target.device.type == "cpu" and source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)
