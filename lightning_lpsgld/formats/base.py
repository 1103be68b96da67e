r"""What a number format answers: the contract of this room, and all that the other rooms know of a format.

Rounding, samplers, banks and reports ask a format and never which class it is. A new format is a frozen dataclass on
:class:`NumberFormat` (or :class:`BlockFormat`, where elements share an exponent) that overrides what differs; the
reference ops round to it from then on, and every other room takes it.

All grids have gaps that are powers of two: near a value lie :math:`k\,2^e` with integer codes k, and a format says
which e (:meth:`NumberFormat.gap_exponents`), where the codes end, and what a block does whose codes pass the end.
Tensors of values are float64 here, exponents int64; draws are handed in, none are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lpsgld.formats.blocks import ALONE, Blocks
from lightning_lpsgld.formats.dtypes import DtypeFacts
from lightning_lpsgld.formats.exponents import BOUNDLESS, power_of_two
from lightning_lpsgld.formats.kernel import KernelIdentity
from lightning_lpsgld.formats.packing import is_packed, packed_size

__all__ = ["BlockFormat", "Bounds", "Coins", "NumberFormat", "require_int"]

#: ``coins("carry")``: fresh words of 32 bits, one an element, int64; each name gives words of its own.
Coins = Callable[[str], Tensor]
#: Smallest and largest code, float64, broadcastable.
Bounds = tuple[Tensor, Tensor]


def require_int(owner: str, name: str, value: object, low: int, high: int) -> None:
    """Refuse a field that is not an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: `{name}` must be an int, got {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{owner}: `{name}` must be in [{low}, {high}], got {value}.")


class NumberFormat:
    """A number format: frozen data that knows its grid. Subclasses are known to :func:`.parse_format` by their names.

    A subclass must say :attr:`bits`, :attr:`max`, :attr:`min`, :meth:`demands`, :meth:`gap_exponents`,
    :meth:`code_limits`, :meth:`pack`, :meth:`unpack`, its name (``__str__``) and :meth:`from_name`. The rest has the
    answers of a format whose elements stand alone and that no fused kernel knows.
    """

    #: Family of its kernel identity (:meth:`kernel`), by which backends say in a table what they can; ``None``: none.
    family: ClassVar[str | None] = None
    #: All formats, in the order in which names are tried.
    kinds: ClassVar[list[type[NumberFormat]]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        NumberFormat.kinds.append(cls)

    # ----------------------------------------------------------------------------------------------------- its name

    @classmethod
    def from_name(cls, name: str) -> NumberFormat | None:
        """The format of this kind that is called ``name`` (lower case, no blanks around it); ``None``: none is.

        ``from_name(str(fmt)) == fmt``. Banks and checkpoints store the name.

        Raises:
            ValueError: If the name is one of this kind's with impossible numbers.
        """
        return None

    # -------------------------------------------------------------------------------------------------- its numbers

    @property
    def bits(self) -> int:
        """Bits stored per element, a shared exponent not counted."""
        raise NotImplementedError

    @property
    def max(self) -> float:
        """Largest value; of a format with blocks, that any block can hold."""
        raise NotImplementedError

    @property
    def min(self) -> float:
        """Smallest (most negative) value; likewise."""
        raise NotImplementedError

    @property
    def gap(self) -> float | None:
        """Distance between neighbouring values where it is the same everywhere; else ``None``."""
        return None

    @property
    def linear(self) -> bool:
        """Whether a stored code times one gap a block (:meth:`gaps`) is the value."""
        return False

    @property
    def edge(self) -> float:
        """Code in units of the gap from which on only every second one exists; infinity if gaps do not grow."""
        return math.inf

    @property
    def blocks(self) -> Blocks:
        """Which elements share an exponent."""
        return ALONE

    @property
    def element(self) -> NumberFormat:
        """Format of an element over its block's scale where that is a format of its own; else the format itself."""
        return self

    def demands(self, facts: DtypeFacts) -> tuple[int, int, int]:
        """What a dtype must have to hold all values: bits of significand, lowest and highest exponent.

        Args:
            facts: What the dtype has. A format whose blocks take only exponents that fit asks for no more than that.
        """
        raise NotImplementedError

    def with_word_length(self, word_length: int) -> NumberFormat | None:
        """Same kind of format with codes of another length; ``None`` if the kind has no length to choose."""
        return None

    def at_least(self) -> str:
        """Name of the format and, in words, the least that it has: for advice about longer words."""
        return f"{self} ({self.bits} bits or more)"

    # -------------------------------------------------------------------------------------- where values are rounded

    def exponent_range(self, dtype: torch.dtype) -> tuple[int, int]:
        """Smallest and largest shared exponent whose whole grid is representable in ``dtype``.

        Raises:
            TypeError: If nothing is shared.
        """
        raise TypeError(f"{self} has no shared exponents.")

    def exponents(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Shared exponents for values ``x``, from the largest finite magnitude of each block.

        Args:
            x: Values of whole blocks, float64 (or ``dtype``, where the format says so). Infinities take no part unless
                a block has nothing else; then it takes the largest exponent. NaN takes no part.
            dtype: dtype of the result, which bounds the exponents.

        Returns:
            int64, one a block (:meth:`.Blocks.compact`); ``None`` where nothing is shared.
        """
        return None

    def exponents_for_nearest(self, x: Tensor, exponents: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The exponents with which ``x`` is rounded to nearest; arguments as :meth:`exponents`, and what that gave."""
        return exponents

    def exponents_with_noise(self, mean: Tensor, sigma: float | Tensor, dtype: torch.dtype) -> Tensor | None:
        """Shared exponents for means to which noise will be added: with room for it, as far as it stays reachable.

        Args:
            mean: Means of whole blocks, float64; the exponents are never below theirs.
            sigma: Standard deviation of the noise: one for all, or float64 of the shape of ``mean``.
            dtype: dtype of the result.

        Returns:
            As :meth:`exponents`. At a raised one the gap is at most twice the smallest ``sigma`` of the block, so that
            no p(1-p)gap**2 exceeds the variance.
        """
        return self.exponents(mean, dtype)

    def gap_exponents(self, x: Tensor, exponents: Tensor | None, sigma: Tensor | None = None) -> Tensor:
        """log2 of the gap around every element, int64, broadcastable against ``x``.

        Where the gaps below and above a value differ (a float's power of two), it is that above; see :attr:`edge`.

        Args:
            x: Values, float64.
            exponents: Shared ones, compact; ``None`` where nothing is shared.
            sigma: Standard deviation of noise that will be added, float64, shape of ``x``: a gap of an element's own is
                raised for it. ``None``: none will be.
        """
        raise NotImplementedError

    def code_limits(self, gap_exponents: Tensor, exponents: Tensor | None) -> Bounds:
        """Smallest and largest code (value over gap) at these gaps."""
        raise NotImplementedError

    def saturated(self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None) -> Tensor:
        """Codes held to :meth:`code_limits`."""
        return codes.clamp(*self.code_limits(gap_exponents, exponents))

    def open_limits(self, gap_exponents: Tensor, exponents: Tensor | None, dtype: torch.dtype) -> Bounds:
        """Codes at which values saturate: beyond every code where a block takes the next exponent instead."""
        return self.code_limits(gap_exponents, exponents)

    def value_limits(self, x: Tensor, variance: float | Tensor = 0.0) -> tuple[float | Tensor, float | Tensor]:
        """Smallest and largest value that each element may have when ``x`` is rounded, broadcastable against ``x``.

        Args:
            x: Values of whole blocks, any floating dtype.
            variance: Of noise that comes with the rounding (Q^vc), where that makes a difference to the scale.

        Returns:
            Floats or float64 tensors; beyond every finite value where a block takes the next exponent.
        """
        return self.min, self.max

    # --------------------------------------------------------------------------------------------- the top of a block

    def carried(
        self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None, dtype: torch.dtype, coins: Coins
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What becomes of stochastically rounded codes of blocks that pass their top; by default they stay.

        Args:
            codes: Codes of whole blocks, float64, not saturated; NaN and infinities take no part.
            gap_exponents: log2 of their gaps, broadcastable.
            exponents: Shared exponents, compact.
            dtype: dtype of the result, which bounds the exponents.
            coins: Words for draws of their own.

        Returns:
            Codes, gaps and exponents; mean of every element unchanged. What still passes the top saturates.
        """
        return codes, gap_exponents, exponents

    def carried_with_noise(
        self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None, dtype: torch.dtype, coins: Coins
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same for codes drawn by Q^vc, which noise may have taken farther; by default :meth:`carried`."""
        return self.carried(codes, gap_exponents, exponents, dtype, coins)

    def doublings(
        self, scaled: Tensor, gap_exponents: Tensor, scales: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of elements of blocks that may take the next exponents: where that starts, how far it goes, what it costs.

        Args:
            scaled: Values over their gaps, float64, whole blocks.
            gap_exponents: log2 of the gaps, broadcastable.
            scales: Shared exponent at every element, broadcastable.
            dtype: dtype of the result.

        Returns:
            Per element, shape of ``scaled``: the largest code (float64), how many exponents higher there are to take,
            and (bool) whether a higher one coarsens the element's gap.
        """
        none = torch.zeros_like(scaled)
        return torch.full_like(scaled, math.inf), none, none > 0

    @property
    def clamps(self) -> bool:
        """Whether the largest element of a block saturates below the next power of two, and may be held there."""
        return False

    @property
    def top_code(self) -> tuple[float, float] | None:
        """Largest code that a block's largest element can have, and the gap there; ``None`` without blocks."""
        return None

    def unclamped(self) -> NumberFormat:
        """The format with which such a block takes the next exponent; itself where none is held."""
        return self

    # ------------------------------------------------------------------------------------------------------ its codes

    @property
    def code_dtype(self) -> torch.dtype:
        """Smallest signed integer dtype that holds a code."""
        return torch.int8 if self.bits <= 8 else torch.int16 if self.bits <= 16 else torch.int32

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the codes and shared exponents of a tensor of ``shape``; codes of less than a byte are packed."""
        count = math.prod(shape)
        codes = packed_size(count, self.bits) if is_packed(self.bits) else self.code_dtype.itemsize * count
        return codes + self.blocks.count(shape)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest stored code; by default all patterns of :attr:`bits` bits, sign on top."""
        width = torch.iinfo(self.code_dtype).bits  # patterns that fill the integer wrap around
        return (0, 2**self.bits - 1) if self.bits < width else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)

    def pack(self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None) -> Tensor:
        """Stored codes of values on the grid, in :attr:`code_dtype`.

        Args:
            codes: Values over their gaps, float64, NaN among them.
            gap_exponents: log2 of the gaps, broadcastable.
            exponents: Shared exponents, compact.

        Raises:
            ValueError: If there is a NaN and the codes have none.
        """
        raise NotImplementedError

    def unpack(self, codes: Tensor, exponents: Tensor | None) -> Tensor:
        """Values of stored codes, float64; exponents (any integer dtype, compact) where they are shared."""
        raise NotImplementedError

    def gaps(self, exponents: Tensor | None) -> Tensor:
        """Gap of each block, float64, compact (0-d where nothing is shared); of :attr:`linear` formats.

        Raises:
            TypeError: If the format is not linear.
        """
        raise TypeError(f"{self} has more than one gap in a block.")

    # ------------------------------------------------------------------------------------------------ other programs

    def kernel(self, dtype: torch.dtype) -> KernelIdentity | None:
        """What fused kernels need to know for tensors of ``dtype``; ``None``: no kernel is meant for this format."""
        return None

    def small_case(self, length: int) -> tuple[tuple[int, ...], NumberFormat]:
        """A shape, and a format that in it has a few blocks of ``length``: what a kernel for such blocks is tried on.

        A kernel sees only how long a block is. Where one is a single element (a scalar, too), a format that makes a
        block of each entry of dim 0 says that of any number of them.
        """
        return (260,), self

    def to_qtorch(self) -> Any:
        """The QPyTorch number that means the same; imports ``qtorch``.

        Raises:
            ValueError: If QPyTorch has no such number; the message says why.
        """
        raise ValueError(f"QPyTorch has no {self}.")


class BlockFormat(NumberFormat):
    """A format whose elements share an exponent, so that its grid depends on the tensor.

    A subclass must also say :attr:`blocks`, :meth:`exponent_range` and :meth:`exponents`, and :attr:`top_code`.
    """

    _blocks: Blocks

    def keep_layout(self, blocks: Blocks) -> None:
        """Keep the layout that the fields say, for :attr:`blocks`, which every op asks for; for ``__post_init__``."""
        object.__setattr__(self, "_blocks", blocks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of objects pickled as plain fields, before layouts were kept."""
        type(self).__init__(self, **state)

    def value_limits(self, x: Tensor, variance: float | Tensor = 0.0) -> tuple[float | Tensor, float | Tensor]:
        """As :meth:`NumberFormat.value_limits`; by default whatever the variance is."""
        wide = x.double()
        exponents = self.exponents(wide, x.dtype)
        gap_exponents = self.gap_exponents(wide, exponents)
        return values_of(self.open_limits(gap_exponents, exponents, x.dtype), gap_exponents)


def values_of(limits: Bounds, gap_exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the smallest and largest code; those beyond every code are beyond every finite value."""
    gap, (low, high) = power_of_two(gap_exponents), limits
    return (gap * low).clamp(min=-BOUNDLESS), (gap * high).clamp(max=BOUNDLESS)
