"""Block floating point: integers that share a power of two per block."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_lpsgld.formats.base import BlockFormat, Bounds, Coins, require_int
from lightning_lpsgld.formats.blocks import Along, Blocks, Runs, Whole
from lightning_lpsgld.formats.carry import halved_until_they_fit
from lightning_lpsgld.formats.dtypes import DTYPES, DtypeFacts
from lightning_lpsgld.formats.exponents import (
    BOUNDLESS,
    NOISE_REACH,
    exponent_of,
    finite_magnitude,
    power_of_two,
    with_headroom,
)
from lightning_lpsgld.formats.kernel import KernelIdentity
from lightning_lpsgld.formats.whole_codes import WholeCodes

__all__ = ["BlockFloatingPoint", "Top"]

#: What becomes of a code beyond the largest one of its block; see :class:`BlockFloatingPoint`.
Top = Literal["carry", "clamp"]

_NAME = re.compile(r"bfp(\d+)(?:b(\d+)|-(tensor)|-dim(-?\d+))?(?:e(\d))?(-clamp)?", re.ASCII)
_MOST_DOUBLINGS = 62


@dataclass(frozen=True)
class BlockFloatingPoint(WholeCodes, BlockFormat):
    r"""Block floating point: integers of W bits that share one power-of-two scale per block.

    With :math:`E = \lfloor\log_2 \max|x|\rfloor` of a block (clamped to the range of the exponent), the gap is
    :math:`\Delta = 2^{E-W+2}` and the values are :math:`k\Delta`, :math:`|k| \le 2^{W-1}-1`: symmetric codes, so that
    quantizing twice changes nothing.

    A largest magnitude between :math:`(2^{W-1}-1)\Delta` and the next power of two may round up to that power, which
    the block's codes do not reach. What happens then is ``top``:

    ===========  =====================================================================================================
    ``"carry"``  the block takes the exponent E + 1, and its codes are rounded onto the doubled gap: even ones are
                 halved, odd ones go up or down by a fair coin. Stochastic rounding has no bias for any element
    ``"clamp"``  the code stays at the largest one, as in QPyTorch and the code published with SWALP and LP-SGLD. The
                 largest element of a block is rounded down: no step smaller than a gap takes a weight over a power of
                 two, so that every power of two is a ceiling for biases and for the largest weight of a row
    ===========  =====================================================================================================

    Args:
        word_length: W, bits of a code with its sign; 2 to 24.
        block_dim: Elements with the same index along this dim form one block: with 0 (the default) a row of a weight,
            a sample of an activation, and *each single element of a 1-D tensor*. ``None``: one block for the tensor.
        exponent_bits: Bits of the shared exponent, 2 to 8; E is in ``[-2**(e-1), 2**(e-1) - 1]``.
        block_size: If given, every run of this many elements **along the last dim** is a block instead (microscaling);
            the last run of a row may be shorter. ``block_dim`` must then be left alone.
        top: What becomes of a code beyond the largest one; at the largest exponent both rules clamp.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range, or both ``block_size`` and a ``block_dim`` other than 0 are given.

    Example:
        >>> fmt = BlockFloatingPoint(8)
        >>> str(fmt), fmt.code_max, fmt.gap_at(0)
        ('bfp8', 127, 0.015625)
        >>> str(BlockFloatingPoint(8, top="clamp"))
        'bfp8-clamp'

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, section 2; Yang et al., 2019 (SWALP), arXiv:1904.11943.
    """

    family: ClassVar[str | None] = "block"

    word_length: int
    block_dim: int | None = 0
    exponent_bits: int = 8
    block_size: int | None = None
    top: Top = "carry"

    def __post_init__(self) -> None:
        if self.top not in get_args(Top):
            raise ValueError(f"BlockFloatingPoint: `top` must be one of {get_args(Top)}, got {self.top!r}.")
        require_int("BlockFloatingPoint", "word_length", self.word_length, 2, 24)
        require_int("BlockFloatingPoint", "exponent_bits", self.exponent_bits, 2, 8)
        if self.block_dim is not None:
            require_int("BlockFloatingPoint", "block_dim", self.block_dim, -8, 8)
        if self.block_size is not None:
            require_int("BlockFloatingPoint", "block_size", self.block_size, 1, 2**20)
            if self.block_dim != 0:
                raise ValueError(
                    f"BlockFloatingPoint: `block_size` cuts the last dim and excludes `block_dim`, "
                    f"got {self.block_dim}."
                )
        self.keep_layout(self._layout())

    @property
    def code_min(self) -> int:
        """Smallest integer code."""
        return -self.code_max

    @property
    def exponent_min(self) -> int:
        """Smallest shared exponent E."""
        return -(2 ** (self.exponent_bits - 1))

    @property
    def exponent_max(self) -> int:
        """Largest shared exponent E."""
        return 2 ** (self.exponent_bits - 1) - 1

    def gap_at(self, exponent: int) -> float:
        """Gap Δ of a block with shared exponent ``exponent``."""
        return 2.0 ** (exponent - self.word_length + 2)

    @property
    def max(self) -> float:
        """Largest value any block can hold."""
        return self.code_max * self.gap_at(self.exponent_max)

    @property
    def min(self) -> float:
        """Smallest (most negative) value any block can hold."""
        return -self.max

    def __str__(self) -> str:
        text = f"bfp{self.word_length}"
        if self.block_size is not None:
            text += f"b{self.block_size}"
        elif self.block_dim is None:
            text += "-tensor"
        elif self.block_dim != 0:
            text += f"-dim{self.block_dim}"
        text += f"e{self.exponent_bits}" if self.exponent_bits != 8 else ""
        return text + ("-clamp" if self.top == "clamp" else "")

    @classmethod
    def from_name(cls, name: str) -> BlockFloatingPoint | None:
        """``"bfp<W>"``: blocks along dim 0; ``b32``, ``-tensor`` or ``-dim1`` for others, ``e5`` and ``-clamp``."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        word, size, tensor, dim, exponent, clamp = match.groups()
        return cls(
            int(word),
            block_dim=None if tensor else int(dim or 0),
            exponent_bits=int(exponent or 8),
            block_size=int(size) if size else None,
            top="clamp" if clamp else "carry",
        )

    # ------------------------------------------------------------------------------------- what every format answers

    @property
    def blocks(self) -> Blocks:
        """A block per index of ``block_dim``, runs of ``block_size``, or the tensor."""
        return self._blocks

    def _layout(self) -> Blocks:
        if self.block_size is not None:
            return Runs(self.block_size)
        return Whole() if self.block_dim is None else Along(self.block_dim)

    @property
    def _offset(self) -> int:
        """log2 of the gap less the exponent."""
        return 2 - self.word_length

    def demands(self, facts: DtypeFacts) -> tuple[int, int, int]:
        """As :meth:`.NumberFormat.demands`."""
        return self.word_length - 1, facts.lowest, min(self.exponent_max, facts.highest)

    def with_word_length(self, word_length: int) -> BlockFloatingPoint:
        """Copy with another word length."""
        return replace(self, word_length=word_length)

    def at_least(self) -> str:
        """As :meth:`.NumberFormat.at_least`."""
        return f"{self} (block floating point of >= {self.word_length} bits)"

    def exponent_range(self, dtype: torch.dtype) -> tuple[int, int]:
        """As :meth:`.NumberFormat.exponent_range`; no gap is smaller than the smallest subnormal of ``dtype``."""
        facts = DTYPES[dtype]
        return max(self.exponent_min, facts.lowest - self._offset), min(self.exponent_max, facts.highest)

    def exponents(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """As :meth:`.NumberFormat.exponents`."""
        low, high = self.exponent_range(dtype)
        largest = self.blocks.max(finite_magnitude(x))
        exponents = exponent_of(largest).clamp(low, high)
        only_infinite = (self.blocks.max(x.isinf().double()) > 0) & (largest == 0)
        return torch.where(only_infinite, torch.full_like(exponents, high), exponents)

    def exponents_for_nearest(self, x: Tensor, exponents: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """One more where the largest magnitude rounds to the next power of two and the block does not clamp.

        All elements are then rounded from their values on the coarser gap, once.
        """
        if self.top == "clamp" or exponents is None:
            return exponents
        codes = self.blocks.max(finite_magnitude(x)) * power_of_two(-(exponents + self._offset))
        return exponents + ((codes.round() > self.code_max) & (exponents < self.exponent_range(dtype)[1]))

    def exponents_with_noise(self, mean: Tensor, sigma: float | Tensor, dtype: torch.dtype) -> Tensor:
        """As :meth:`.NumberFormat.exponents_with_noise`."""
        reach = self.blocks.max(finite_magnitude(mean) + NOISE_REACH * sigma)
        smallest = -self.blocks.max(
            -torch.as_tensor(sigma, dtype=torch.float64, device=mean.device).expand(mean.shape), fill=-torch.inf
        )
        own = self.exponents(mean, dtype)
        return with_headroom(own, reach, smallest, self._offset, self.code_max).clamp(*self.exponent_range(dtype))

    def gap_exponents(self, x: Tensor, exponents: Tensor | None, sigma: Tensor | None = None) -> Tensor:
        """As :meth:`.NumberFormat.gap_exponents`."""
        assert exponents is not None
        return self.blocks.expand(exponents, x.shape) + self._offset

    def open_limits(self, gap_exponents: Tensor, exponents: Tensor | None, dtype: torch.dtype) -> Bounds:
        """Boundless below the largest exponent of a block that carries."""
        _, top = self.code_limits(gap_exponents, exponents)
        if self.top == "carry":
            top = torch.where(gap_exponents < self.exponent_range(dtype)[1] + self._offset, BOUNDLESS, top)
        return -top, top

    def carried(
        self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None, dtype: torch.dtype, coins: Coins
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rounded onto coarser gaps until they fit; see :mod:`.carry`."""
        assert exponents is not None
        largest = self.blocks.max(finite_magnitude(codes))
        if self.top == "clamp" or (codes.device.type == "cpu" and not bool((largest > self.code_max).any())):
            return codes, gap_exponents, exponents  # (elsewhere than on a CPU, to look would synchronise)
        room = (self.exponent_range(dtype)[1] - exponents).clamp(0, _MOST_DOUBLINGS)
        codes, levels = halved_until_they_fit(codes, self.blocks, self.code_max, room, coins("carry"))
        return codes, gap_exponents + self.blocks.expand(levels, codes.shape), exponents + levels

    def doublings(
        self, scaled: Tensor, gap_exponents: Tensor, scales: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`.NumberFormat.doublings`: all elements' gaps double."""
        last = self.exponent_range(dtype)[1] + self._offset
        room = (last - gap_exponents).clamp(0, _MOST_DOUBLINGS) * (self.top == "carry")
        return torch.full_like(scaled, self.code_max), room.expand(scaled.shape), torch.ones_like(scaled) > 0

    @property
    def clamps(self) -> bool:
        """Under the published rule."""
        return self.top == "clamp"

    @property
    def top_code(self) -> tuple[float, float]:
        """The largest code, and 1."""
        return float(self.code_max), 1.0

    def unclamped(self) -> BlockFloatingPoint:
        """The same without ``-clamp``."""
        return replace(self, top="carry")

    def unpack(self, codes: Tensor, exponents: Tensor | None) -> Tensor:
        """Code times the gap of the block."""
        assert exponents is not None
        return codes.double() * power_of_two(self.blocks.expand(exponents.long(), codes.shape) + self._offset)

    def gaps(self, exponents: Tensor | None) -> Tensor:
        """As :meth:`.NumberFormat.gaps`."""
        assert exponents is not None
        return power_of_two(exponents.long() + self._offset)

    def kernel(self, dtype: torch.dtype) -> KernelIdentity:
        """Family ``"block"``."""
        low, high = self.exponent_range(dtype)
        ends = (self.code_min, self.code_max, self.min, self.max)
        return KernelIdentity(self._offset, low, high, *ends, carries=self.top == "carry")

    def small_case(self, length: int) -> tuple[tuple[int, ...], BlockFloatingPoint]:
        """Two rows, or a vector."""
        return ((60,) if length <= 1 else (2, length)), replace(self, block_dim=0, block_size=None)

    def to_qtorch(self) -> Any:
        """As :meth:`.NumberFormat.to_qtorch`.

        Raises:
            ValueError: If QPyTorch has no such blocks: runs of a size, other exponents, another rule at the top.
        """
        if self.block_size is not None or self.exponent_bits != 8 or (self.block_dim or 0) < 0:
            raise ValueError(f"QPyTorch's blocks are whole dims with 8-bit exponents; it has no {self}.")
        if self.top != "clamp":
            raise ValueError(
                f"QPyTorch clamps at the top of a block, {self} does not; use '{self}-clamp' for its rule."
            )
        import qtorch

        return qtorch.BlockFloatingPoint(wl=self.word_length, dim=-1 if self.block_dim is None else self.block_dim)
