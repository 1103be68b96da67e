"""The codes that a cast tensor carries: found again from the tensor, or from a view of it, while it is unchanged.

One place for whoever needs them: what autograd keeps for backward (``saved``), products of codes, stored samples.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_lpsgld.casting.storage import StorageTag, storage_pointer
from lightning_lpsgld.formats import FixedPoint, NumberFormat, code_dtype
from lightning_lpsgld.ops import Encoded, decode
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.ops.stored import StoredCodes

__all__ = ["CodeBook", "Codes"]

_PRUNE_EVERY = 32


class Codes:
    """Codes of one cast tensor.

    Args:
        encoded: The codes.
        out: The tensor; not kept.

    Attributes:
        flagged: Whether code -1 stands for a zero that was zero before rounding too.
        dtype: Of the tensor.
        tag: By which the tensor is recognised.
        site: Where it was cast.
    """

    __slots__ = ("_alive", "_kept", "dtype", "flagged", "site", "tag")

    def __init__(self, encoded: Encoded | StoredCodes, out: Tensor) -> None:
        self._kept, self.dtype, self.tag, self.site = encoded, out.dtype, StorageTag(out), ""
        self.flagged = False
        self._alive: weakref.ref[Tensor] | None = None

    def pack(self) -> None:
        """Keep codes of fewer than 8 bits side by side from now on: nobody needs them until backward."""
        if isinstance(self._kept, Encoded):
            self._kept = StoredCodes.of(self._kept)

    def twin(self, out: Tensor) -> Codes:
        """Codes of another tensor with the same values."""
        twin = Codes(self._kept, out)
        twin.flagged, twin.site = self.flagged, self.site
        return twin

    @property
    def format(self) -> NumberFormat:
        """The grid."""
        return self._kept.format

    def _codes(self) -> Tensor:
        """With flags, if there are any."""
        kept = self._kept
        if isinstance(kept, Encoded):
            return kept.codes
        return kept.unpacked(signed=self.flagged or kept.signed) if kept.packed else kept.codes

    @property
    def plain(self) -> Encoded:
        """The codes, without flags."""
        codes = self._codes()
        return Encoded(codes.clamp(min=0) if self.flagged else codes, self._kept.exponents, self.format)

    def aligned(self, x: Tensor) -> Encoded | None:
        """Codes in the shape of ``x``, the tensor or a view of it; ``None`` if the view mixes blocks."""
        if self.tag.is_whole(x):
            return self.plain
        exponents, shift = self._kept.exponents, x.storage_offset() - self.tag.offset
        shared = exponents is None or exponents.ndim == 0
        samples = x.ndim > 0 and (x.shape[0], x.stride(0)) == (self.tag.size[0], self.tag.stride[0])
        codes = self.plain.codes
        if not (shared or (samples and 0 <= shift < x.stride(0))) or codes.stride() != self.tag.stride or shift < 0:
            return None
        view = codes.as_strided(x.size(), x.stride(), codes.storage_offset() + shift)
        return Encoded(view, exponents, self.format)

    def flag_zeros(self, raw: Tensor) -> None:
        """Send code 0 to -1 where ``raw`` is zero; the result of a ReLU has no negative codes of its own."""
        assert isinstance(self._kept, Encoded)
        self._kept.codes.sub_((raw == 0).view(torch.int8))  # masked_fill_ does the same a hundred times slower
        self.flagged = True

    def signs(self, backend: BackendName) -> Tensor:
        """Tensor of the shape of a flagged activation, positive where it was positive before rounding."""
        odd = self._codes() | 1  # -1 stays, 0 becomes 1
        number = FixedPoint(min(self.format.bits, 24), 0)
        if odd.dtype == code_dtype(number) and number.code_max <= 1 / torch.finfo(self.dtype).eps:
            return decode(Encoded(odd, None, number), self.dtype, backend=backend)
        return odd.to(self.dtype)

    def value(self, backend: BackendName) -> Tensor:
        """The cast tensor, in its own memory layout; shared between consumers that want it at the same time."""
        value = None if self._alive is None else self._alive()
        if value is None:
            kept = self._kept
            if self.flagged or isinstance(kept, Encoded):
                value = decode(self.plain, self.dtype, backend=backend)
            else:
                value = kept.decoded(self.dtype, backend=backend)
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
        return self._add(Codes(encoded, out), out)

    def _add(self, codes: Codes, out: Tensor) -> Codes:
        if len(self._records) % _PRUNE_EVERY == _PRUNE_EVERY - 1:
            self._records = {at: codes for at, codes in self._records.items() if not codes.tag.expired}
        self._records[storage_pointer(out)] = codes
        return codes

    def alias(self, out: Tensor, x: Tensor) -> None:
        """Let ``x``, which holds the same values as the cast ``out``, carry the codes too."""
        codes = self._records.get(storage_pointer(out))
        if codes is not None and codes.tag.holds(out) and x.shape == out.shape and x.dtype == out.dtype:
            self._add(codes.twin(x), x)

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
