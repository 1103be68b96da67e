"""The codes that a cast tensor carries: found again from the tensor, or from a view of it, while it is unchanged.

One place for whoever needs them: what autograd keeps for backward (``saved``), products of codes, stored samples.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_lpsgld.casting.storage import StorageTag, storage_pointer
from lightning_lpsgld.formats import FixedPoint, code_dtype
from lightning_lpsgld.ops import Encoded, decode
from lightning_lpsgld.ops.dispatch import BackendName

__all__ = ["CodeBook", "Codes"]

_PRUNE_EVERY = 32


class Codes:
    """Codes of one cast tensor.

    Args:
        encoded: The codes.
        out: The tensor; not kept.

    Attributes:
        encoded: As given; of a flagged tensor code -1 stands for a zero that was zero before rounding too.
        flagged: Whether that is so.
        dtype: Of the tensor.
        tag: By which the tensor is recognised.
        site: Where it was cast.
    """

    __slots__ = ("_alive", "dtype", "encoded", "flagged", "site", "tag")

    def __init__(self, encoded: Encoded, out: Tensor) -> None:
        self.encoded, self.dtype, self.tag, self.site = encoded, out.dtype, StorageTag(out), ""
        self.flagged = False
        self._alive: weakref.ref[Tensor] | None = None

    @property
    def plain(self) -> Encoded:
        """The codes, without flags."""
        encoded = self.encoded
        return Encoded(encoded.codes.clamp(min=0), encoded.exponents, encoded.format) if self.flagged else encoded

    def aligned(self, x: Tensor) -> Encoded | None:
        """Codes in the shape of ``x``, the tensor or a view of it; ``None`` if the view mixes blocks."""
        if self.tag.is_whole(x):
            return self.plain
        exponents, shift = self.encoded.exponents, x.storage_offset() - self.tag.offset
        shared = exponents is None or exponents.ndim == 0
        samples = x.ndim > 0 and (x.shape[0], x.stride(0)) == (self.tag.size[0], self.tag.stride[0])
        codes = self.plain.codes
        if not (shared or (samples and 0 <= shift < x.stride(0))) or codes.stride() != self.tag.stride or shift < 0:
            return None
        view = codes.as_strided(x.size(), x.stride(), codes.storage_offset() + shift)
        return Encoded(view, exponents, self.encoded.format)

    def flag_zeros(self, raw: Tensor) -> None:
        """Send code 0 to -1 where ``raw`` is zero; the result of a ReLU has no negative codes of its own."""
        self.encoded.codes.sub_((raw == 0).view(torch.int8))  # masked_fill_ does the same a hundred times slower
        self.flagged = True

    def signs(self, backend: BackendName) -> Tensor:
        """Tensor of the shape of a flagged activation, positive where it was positive before rounding."""
        odd = self.encoded.codes | 1  # -1 stays, 0 becomes 1
        number = FixedPoint(min(self.encoded.format.bits, 24), 0)
        if odd.dtype == code_dtype(number) and number.code_max <= 1 / torch.finfo(self.dtype).eps:
            return decode(Encoded(odd, None, number), self.dtype, backend=backend)
        return odd.to(self.dtype)

    def value(self, backend: BackendName) -> Tensor:
        """The cast tensor, in its own memory layout; shared between consumers that want it at the same time."""
        value = None if self._alive is None else self._alive()
        if value is None:
            value = decode(self.plain, self.dtype, backend=backend)
            if value.stride() != self.tag.stride:
                value = value.new_empty_strided(self.tag.size, self.tag.stride).copy_(value)
            self._alive = weakref.ref(value)
        return value


class CodeBook:
    """Codes of the cast tensors that are alive, by the memory they lie in."""

    def __init__(self) -> None:
        self._records: dict[int, Codes] = {}

    def __len__(self) -> int:
        return len(self._records)

    def register(self, out: Tensor, encoded: Encoded) -> Codes:
        """Remember that ``out`` is what ``encoded`` decodes to."""
        if len(self._records) % _PRUNE_EVERY == _PRUNE_EVERY - 1:
            self._records = {at: codes for at, codes in self._records.items() if not codes.tag.expired}
        codes = Codes(encoded, out)
        self._records[storage_pointer(out)] = codes
        return codes

    def alias(self, out: Tensor, x: Tensor) -> None:
        """Let ``x``, which holds the same values as the cast ``out``, carry the codes too."""
        codes = self._records.get(storage_pointer(out))
        if codes is not None and codes.tag.holds(out) and x.shape == out.shape and x.dtype == out.dtype:
            twin = self.register(x, codes.encoded)
            twin.flagged, twin.site = codes.flagged, codes.site

    def forget(self, x: Tensor) -> None:
        """``x``, or a view of it, was overwritten: not all tensors count that (those of inference mode do not)."""
        self._records.pop(storage_pointer(x), None)

    def of(self, x: Tensor) -> Codes | None:
        """Codes of a cast tensor, or of the one that ``x`` is a view of (compare ``tag``); ``None`` if there are none.

        A tensor that was overwritten, or reinterpreted in another dtype, has none any more.
        """
        if isinstance(x, Parameter):
            return None
        codes = self._records.get(storage_pointer(x))
        return codes if codes is not None and codes.dtype == x.dtype and codes.tag.holds(x) else None

    def clear(self) -> None:
        """Forget all; whoever took codes keeps them."""
        self._records.clear()
