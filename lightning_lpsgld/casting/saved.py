"""What autograd saves of rounded activations, kept as codes and exponents and decoded in backward."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_lpsgld.casting.draws import Rounding
from lightning_lpsgld.casting.storage import StorageTag, storage_pointer
from lightning_lpsgld.formats import FixedPoint, NumberFormat, code_dtype
from lightning_lpsgld.ops import Encoded, decode, encode, quantize
from lightning_lpsgld.ops.autograd import Rounder, cast_with
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.random import DrawKey

__all__ = ["CodeStore", "ReluSigns"]

_PRUNE_EVERY = 32


class _Record:
    """Codes of one rounded activation; ``flagged``: code -1 stands for a zero that was zero before rounding too."""

    __slots__ = ("_alive", "dtype", "encoded", "flagged", "tag")

    def __init__(self, encoded: Encoded, out: Tensor) -> None:
        self.encoded, self.dtype, self.tag = encoded, out.dtype, StorageTag(out)
        self.flagged = False
        self._alive: weakref.ref[Tensor] | None = None

    def flag_zeros(self, raw: Tensor) -> None:
        """Send code 0 to -1 where ``raw`` is zero; the result of a ReLU has no negative codes of its own."""
        codes = self.encoded.codes
        codes.sub_((raw == 0).view(torch.int8))  # masked_fill_ does the same a hundred times slower
        self.flagged = True

    def signs(self, backend: BackendName) -> Tensor:
        """Tensor of the shape of a flagged activation, positive where it was positive before rounding."""
        odd = self.encoded.codes | 1  # -1 stays, 0 becomes 1
        number = FixedPoint(min(self.encoded.format.bits, 24), 0)
        if odd.dtype == code_dtype(number) and number.code_max <= 1 / torch.finfo(self.dtype).eps:
            return decode(Encoded(odd, None, number), self.dtype, backend=backend)
        return odd.to(self.dtype)

    def value(self, backend: BackendName) -> Tensor:
        """The rounded activation, in its own memory layout; shared between consumers that want it at the same time."""
        value = None if self._alive is None else self._alive()
        if value is None:
            encoded = self.encoded
            if self.flagged:
                encoded = Encoded(encoded.codes.clamp(min=0), encoded.exponents, encoded.format)
            value = decode(encoded, self.dtype, backend=backend)
            if value.stride() != self.tag.stride:
                value = value.new_empty_strided(self.tag.size, self.tag.stride).copy_(value)
            self._alive = weakref.ref(value)
        return value


class _Saved:
    """A saved tensor that is a rounded activation or a view of one."""

    __slots__ = ("offset", "record", "size", "stride")

    def __init__(self, record: _Record, x: Tensor) -> None:
        self.record, self.size, self.stride, self.offset = record, x.size(), x.stride(), x.storage_offset()

    def unpack(self, backend: BackendName) -> Tensor:
        value, tag = self.record.value(backend), self.record.tag
        if (self.size, self.stride, self.offset) == (tag.size, tag.stride, tag.offset):
            return value
        return value.as_strided(self.size, self.stride, self.offset - tag.offset)


class ReluSigns:
    """Stands for the result that a ReLU saves: backward asks only where it is positive.

    Until the codes of the rounded result are attached, the result itself is held.
    """

    def __init__(self, backend: BackendName) -> None:
        self._backend = backend
        self._result: Tensor | None = None
        self._record: _Record | None = None

    def pack(self, result: Tensor) -> ReluSigns:
        """Pack hook of the ReLU."""
        self._result = result
        return self

    def attach(self, record: _Record, raw: Tensor) -> None:
        """Let the codes stand for the result; ``raw`` is the result before rounding."""
        if self._result is not None:
            record.flag_zeros(raw)
            self._record, self._result = record, None

    @staticmethod
    def unpack(signs: ReluSigns) -> Tensor:
        """Unpack hook: the result, or a tensor of its shape that is positive at the same elements."""
        if signs._record is not None:
            return signs._record.signs(signs._backend)
        assert signs._result is not None
        return signs._result


class CodeStore:
    """Rounds through codes, and recognises what autograd saves of the result.

    Args:
        fmt: Format of the activations.
        backend: For the ops.
    """

    def __init__(self, fmt: NumberFormat, backend: BackendName) -> None:
        self.fmt, self.backend = fmt, backend
        self._records: dict[int, _Record] = {}

    def round(self, x: Tensor, rounding: Rounding, key: DrawKey | None) -> tuple[Tensor, Encoded | None]:
        """``quantize(x)`` by way of codes, and the codes; ``None`` where the format has no code (a NaN)."""
        try:
            encoded = encode(x, self.fmt, rounding=rounding, key=key, backend=self.backend)
        except ValueError:  # the plain quantizer keeps NaN; whatever else is wrong with the call it will say
            return quantize(x, self.fmt, rounding=rounding, key=key, backend=self.backend), None
        return decode(encoded, x.dtype, backend=self.backend), encoded

    def register(self, out: Tensor, encoded: Encoded) -> _Record:
        """Remember that ``out`` is what ``encoded`` decodes to."""
        if len(self._records) % _PRUNE_EVERY == _PRUNE_EVERY - 1:
            self._records = {at: record for at, record in self._records.items() if not record.tag.expired}
        record = _Record(encoded, out)
        self._records[storage_pointer(out)] = record
        return record

    def cast(
        self, x: Tensor, rounding: Rounding, key: DrawKey | None, error: Rounder | None, signs: ReluSigns | None = None
    ) -> Tensor:
        """Round ``x`` now and its gradient by ``error`` later; ``signs`` belongs to the ReLU that gave ``x``."""
        codes: list[Encoded | None] = []

        def activation(value: Tensor) -> Tensor:
            rounded, encoded = self.round(value, rounding, key)
            codes.append(encoded)
            return rounded

        out = cast_with(x, activation, error)
        if codes[0] is not None:
            record = self.register(out, codes[0])
            if signs is not None:
                signs.attach(record, x.detach())
        return out

    def alias(self, out: Tensor, x: Tensor) -> None:
        """Let ``x``, which holds the same values as the rounded ``out``, be recognised too."""
        record = self._records.get(storage_pointer(out))
        if record is not None and record.tag.holds(out) and x.shape == out.shape and x.dtype == out.dtype:
            twin = self.register(x, record.encoded)
            twin.flagged = record.flagged

    def clear(self) -> None:
        """Forget what was rounded; tensors already packed keep their codes."""
        self._records.clear()

    def pack(self, x: Tensor) -> Any:
        """Pack hook of autograd: codes for a rounded activation, anything else as it is with its version."""
        if not isinstance(x, Parameter):
            record = self._records.get(storage_pointer(x))
            if record is not None and record.dtype == x.dtype and record.tag.holds(x):
                return _Saved(record, x)
        return x, x._version

    def unpack(self, packed: Any) -> Tensor:
        """Unpack hook of autograd.

        Raises:
            RuntimeError: If a saved tensor was overwritten since (hooks switch off autograd's own check).
        """
        if isinstance(packed, _Saved):
            return packed.unpack(self.backend)
        x, version = packed
        if x._version != version:
            raise RuntimeError(
                f"A tensor of shape {tuple(x.shape)} that backward needs has been modified by an in-place operation "
                f"(version {x._version}, expected {version}). Use the out-of-place form of that operation."
            )
        return x
