"""Codes and exponents as they stay in memory between uses: those of fewer than 8 bits side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.formats.packing import check_packed, is_packed, packed_size
from lightning_lpsgld.ops.dispatch import BackendName, choose
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.functional import decode
from lightning_lpsgld.ops.packing import pack, unpack

__all__ = ["StoredCodes"]


@dataclass(frozen=True)
class StoredCodes:
    """What a tensor on a grid is stored as: ``ceil(n * bits / 8)`` bytes for n codes of fewer than 8 bits.

    Packed codes are one stream in the order of the tensor's memory, code i from bit ``i * bits`` on, as in a bank: no
    byte is left between rows. Every :attr:`stride_of_rows` rows one begins at a byte.

    Attributes:
        codes: As in :class:`~lightning_lpsgld.ops.Encoded`; packed ones are uint8 of one dim.
        exponents: As there.
        format: The grid.
        shape: Of the tensor.
        stride: Of the tensor, whose memory is dense.

    Example:
        >>> from lightning_lpsgld.ops import encode
        >>> stored = StoredCodes.of(encode(torch.ones(3, 5), "bfp4"))
        >>> stored.codes.nbytes, stored.decoded(torch.float32).sum()
        (8, tensor(15.))
    """

    codes: Tensor
    exponents: Tensor | None
    format: NumberFormat
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, encoded: Encoded) -> StoredCodes:
        """Codes to be stored: packed if they are short, taken as they are if not."""
        codes, bits = encoded.codes, encoded.format.bits
        if is_packed(bits):
            codes = codes if _is_dense(codes) else codes.contiguous()
            flat = codes.as_strided((codes.numel(),), (1,))
            return cls(pack(flat, bits), encoded.exponents, encoded.format, codes.shape, codes.stride())
        return cls(codes, encoded.exponents, encoded.format, codes.shape, codes.stride())

    @classmethod
    def loaded(
        cls, codes: Tensor, exponents: Tensor | None, fmt: NumberFormat, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> StoredCodes:
        """Packed codes that come from outside.

        Raises:
            ValueError: If they are none of a tensor of that shape and stride.
        """
        shape = torch.Size(shape)
        if shape.numel() and not _is_dense(torch.empty_strided(shape, stride, device="meta")):
            raise ValueError(f"Packed codes are of dense memory, got strides {stride} for shape {tuple(shape)}.")
        check_packed(codes, fmt.bits, shape.numel())
        return cls(codes, exponents, fmt, shape, tuple(stride))

    @classmethod
    def joined(
        cls, codes: Tensor, part: torch.Size, exponents: Tensor | None, fmt: NumberFormat, shape: torch.Size
    ) -> StoredCodes:
        """Codes of equal parts along dim 0, each row-major and packed by itself, one after the other in memory.

        Args:
            codes: Those of all parts; int8 or uint8 where they are packed.
            part: Shape of a part.
            exponents: Of the whole.
            fmt: The grid.
            shape: Of the whole.
        """
        whole = torch.empty(shape, dtype=fmt.code_dtype, device="meta")
        if not is_packed(fmt.bits):
            return cls(codes.view(shape), exponents, fmt, shape, whole.stride())
        codes = codes.view(torch.uint8)
        if part.numel() * fmt.bits % 8 == 0:  # no bit is left between them
            return cls(codes, exponents, fmt, shape, whole.stride())
        signed = fmt.code_range[0] < 0
        parts = [unpack(piece, fmt.bits, part, signed=signed) for piece in codes.view(shape[0] // part[0], -1)]
        return cls.of(Encoded(torch.cat(parts), exponents, fmt))

    # --------------------------------------------------------------------------------------------------------- facts

    @property
    def packed(self) -> bool:
        """Whether several codes share a byte."""
        return is_packed(self.format.bits)

    @property
    def signed(self) -> bool:
        """Whether codes may be negative."""
        return self.format.code_range[0] < 0

    @property
    def nbytes(self) -> int:
        """Bytes of codes and exponents together."""
        return self.codes.nbytes + (0 if self.exponents is None else self.exponents.nbytes)

    @property
    def row(self) -> int:
        """Elements of a row: of what has one index along dim 0."""
        return math.prod(self.shape[1:])

    @property
    def stride_of_rows(self) -> int:
        """Rows from one that begins at a byte to the next that does: 1, 2, 4 or 8."""
        return 8 // math.gcd(8, self.row * self.format.bits) if self.packed else 1

    @property
    def divisible(self) -> bool:
        """Whether rows lie one after the other in memory and share no exponent."""
        ndim = len(self.shape)
        if not ndim or self.format.blocks.crosses_rows(ndim):
            return False
        return self.shape[0] < 2 or self.stride[0] == self.row

    # -------------------------------------------------------------------------------------------------------- reading

    def empty(self, dtype: torch.dtype) -> Tensor:
        """A tensor of the same shape and memory order, not initialized."""
        return torch.empty_strided(self.shape, self.stride, dtype=dtype, device=self.codes.device)

    def encoded(self) -> Encoded:
        """Codes and exponents; codes that are not packed share memory."""
        if not self.packed:
            return Encoded(self.codes, self.exponents, self.format)
        return Encoded(self.unpacked(signed=self.signed), self.exponents, self.format)

    def unpacked(self, *, signed: bool) -> Tensor:
        """Packed codes a byte each."""
        flat = unpack(self.codes, self.format.bits, (self.shape.numel(),), signed=signed)
        return flat.as_strided(self.shape, self.stride)

    def decoded(self, dtype: torch.dtype, *, backend: BackendName = "auto") -> Tensor:
        """The values, exact: a new tensor in the memory order of the codes."""
        found = self._decoded(dtype, backend)
        return found if found.stride() == self.stride else self.empty(dtype).copy_(found)

    def _decoded(self, dtype: torch.dtype, backend: BackendName) -> Tensor:
        if self.packed and self.shape.numel() and dtype != torch.float64:
            like = self.codes.new_empty(()).expand(self.shape)  # says shape and device, and has no memory
            fused = getattr(choose(backend, "decode", like, self.format), "decode_packed", None)
            if fused is not None:
                values = self.empty(torch.float32)
                if fused(self.codes, self.exponents, self.format, values):
                    return values.to(dtype)
        return decode(self.encoded(), dtype, backend=backend)

    def rows(self, start: int, stop: int) -> StoredCodes:
        """Rows [start, stop), sharing memory; of what is :attr:`divisible`.

        Args:
            start: A multiple of :attr:`stride_of_rows`.
            stop: Likewise, or the number of rows.
        """
        shape = torch.Size((stop - start, *self.shape[1:]))
        exponents = None if self.exponents is None else self.exponents[start:stop]
        if not self.packed:
            return StoredCodes(self.codes[start:stop], exponents, self.format, shape, self.stride)
        bits = self.row * self.format.bits
        codes = self.codes[start * bits // 8 : packed_size(stop, bits)]
        return StoredCodes(codes, exponents, self.format, shape, self.stride)

    def looked_up(self, indices: Tensor) -> Encoded:
        """Rows of a matrix by their numbers, of what is :attr:`divisible` and row-major.

        Args:
            indices: int64 or int32, one dim.

        Raises:
            IndexError: If there is no such row.
        """
        exponents = None if self.exponents is None else self.exponents.index_select(0, indices)
        if not self.packed:
            return Encoded(self.codes.index_select(0, indices), exponents, self.format)
        bits, row, first = self.format.bits, self.row, indices.long() * self.row
        if self.stride_of_rows == 1:
            streams, skipped = self.codes.view(-1, row * bits // 8).index_select(0, indices), None
        else:  # with the eights of codes that a row begins and ends in
            self.codes.new_empty(()).expand(self.shape[0]).index_select(0, indices)  # refuses what is no row
            many = (row + 14) // 8 * bits
            places = (first // 8 * bits).unsqueeze(1) + torch.arange(many, device=indices.device)
            streams, skipped = self.codes[places.clamp_(max=self.codes.numel() - 1)], first % 8
        found = streams.shape[1] * 8 // bits
        codes = unpack(streams.reshape(-1), bits, (len(indices), found), signed=self.signed)
        if skipped is not None:
            codes = codes.gather(1, skipped.unsqueeze(1) + torch.arange(row, device=indices.device))
        return Encoded(codes, exponents, self.format)

    # -------------------------------------------------------------------------------------------------------- writing

    def write(self, new: StoredCodes) -> None:
        """Take over codes of the same format and shape; copied."""
        if self.packed and self.stride != new.stride:
            new = StoredCodes.of(Encoded(self.empty(torch.int8).copy_(new.encoded().codes), new.exponents, new.format))
        _copy(new.codes, self.codes)
        if self.exponents is not None and new.exponents is not None:
            _copy(new.exponents, self.exponents)

    def copied(self, device: torch.device) -> StoredCodes:
        """The same in memory of its own."""
        exponents = None if self.exponents is None else self.exponents.to(device, copy=True)
        return StoredCodes(self.codes.to(device, copy=True), exponents, self.format, self.shape, self.stride)


def _is_dense(x: Tensor) -> bool:
    """Whether elements lie in memory without gaps, in any order."""
    return torch.empty_like(x).stride() == x.stride()


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy by the calling thread: to wake others for a few hundred kilobytes takes longer where cores are busy."""
    if target.device.type == "cpu" and source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)
