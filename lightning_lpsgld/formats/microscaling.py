"""Microscaling floats (OCP MX): small floating-point elements that share a power-of-two scale per run."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_lpsgld.formats.base import BlockFormat, Bounds, Coins, require_int
from lightning_lpsgld.formats.blocks import Blocks, Runs
from lightning_lpsgld.formats.dtypes import DTYPES, DtypeFacts
from lightning_lpsgld.formats.exponents import (
    BOUNDLESS,
    NOISE_REACH,
    exponent_of,
    finite_magnitude,
    power_of_two,
)
from lightning_lpsgld.formats.floating import FloatingPoint
from lightning_lpsgld.formats.kernel import KernelIdentity

__all__ = ["MicroscalingFloat", "Scaling"]

#: How the scale of a run follows from its largest magnitude; see :class:`MicroscalingFloat`.
Scaling = Literal["floor", "fit"]

#: (exponent bits, mantissa bits) of the floating element types of OCP MX v1.0, table 1, and their formats.
_ELEMENTS = {(e, m): FloatingPoint(e, m) for e, m in ((4, 3), (5, 2), (3, 2), (2, 3), (2, 1))}

_NAME = re.compile(r"mxfp(\d)e(\d)m(\d)(?:b(\d+))?(-fit)?", re.ASCII)


@dataclass(frozen=True)
class MicroscalingFloat(BlockFormat):
    r"""Runs of ``block_size`` elements along the last dim, each a small float times one power of two X per run.

    With M the largest finite magnitude of a run, P the grid of :attr:`element` (subnormals included) and
    :math:`e_{max}` the exponent of its largest number, the values of the run are :math:`X p`, :math:`p \in P`, and

    ==========  =========================================================  ========================================
    scaling     X                                                          consequence
    ==========  =========================================================  ========================================
    ``"floor"`` :math:`2^{\lfloor\log_2 M\rfloor - e_{max}}`               M between max P and the next power of two
                                                                           saturates: by up to 1/8 of it for e4m3 and
                                                                           e5m2, 1/16 for e2m3, 1/4 for e2m1
    ``"fit"``   smallest power of two with :math:`M \le X \max P`          nothing saturates, stochastic rounding has
                                                                           no bias; the gap around zero doubles where
                                                                           the two rules differ
    ==========  =========================================================  ========================================

    ``"floor"`` is the conversion of OCP MX v1.0, section 6.3: the largest power of two not above M, divided by the
    largest power of two of the element type, elements rounded to nearest even and clamped to the largest normal
    number. ``"fit"`` rounds the scale up, as hardware recipes for MXFP8 training do. **Weights that are sampled should
    take** ``"fit"`` (``"mxfp8e4m3-fit"``): under ``"floor"`` the largest weight of a run is held at max P until one
    step carries it over the next power of two.

    Quantizing twice changes nothing, under both rules. A larger scale is never asked for the second time, because
    nothing rounds beyond :math:`\max P < 2^{e_{max}+1}`; and a smaller one, which ``"fit"`` may find, keeps every
    value, because grids are nested: with :math:`p \in P` and :math:`2|p| \le \max P` also :math:`2p \in P`.

    Departures from the specification: infinities are left out of M and saturate, NaN stays NaN in its place (the
    specification lets one of them spoil the run); X never is NaN; the exponent of X is held to what the tensor's dtype
    can hold exactly; there is no negative zero; a run at the end of a row may be shorter. An element of 4 or 6 bits
    is stored in a byte of its own. MXINT8 is ``"mxint8"``, a :class:`BlockFloatingPoint`.

    Args:
        exponent_bits: e of the element.
        mantissa_bits: m of the element; (e, m) is (4, 3), (5, 2), (3, 2), (2, 3) or (2, 1).
        block_size: Elements along the last dim that share X; 32 in the specification. The last run of a row may be
            shorter; a 0-d tensor is one run.
        scaling: How X follows from M.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If the specification has no such element, or a field is out of range.

    Example:
        >>> fmt = MicroscalingFloat(4, 3)
        >>> str(fmt), fmt.bits, fmt.element.max, fmt.gap_at(0)
        ('mxfp8e4m3', 8, 448.0, 0.001953125)

    Reference:
        OCP Microscaling Formats (MX) Specification, version 1.0, 2023, sections 5 and 6.3; Rouhani et al., 2023,
        arXiv:2310.10537, algorithm 1; Mishra et al., 2025, arXiv:2506.08027 (scales rounded up).
    """

    family: ClassVar[str | None] = "scaled"

    exponent_bits: int
    mantissa_bits: int
    block_size: int = 32
    scaling: Scaling = "floor"

    def __post_init__(self) -> None:
        for name in ("exponent_bits", "mantissa_bits"):
            require_int("MicroscalingFloat", name, getattr(self, name), 1, 5)
        if (self.exponent_bits, self.mantissa_bits) not in _ELEMENTS:
            known, asked = ", ".join(map(str, _ELEMENTS.values())), (self.exponent_bits, self.mantissa_bits)
            raise ValueError(f"MicroscalingFloat: the element must be one of {known}, got {asked}.")
        require_int("MicroscalingFloat", "block_size", self.block_size, 1, 2**20)
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"MicroscalingFloat: `scaling` must be one of {get_args(Scaling)}, got {self.scaling!r}.")
        self.keep_layout(Runs(self.block_size))

    @property
    def element(self) -> FloatingPoint:
        """Format of an element over its run's scale."""
        return _ELEMENTS[self.exponent_bits, self.mantissa_bits]

    @property
    def bits(self) -> int:
        """Bits of an element, the shared scale not counted."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def exponent_min(self) -> int:
        """Smallest log2 of a scale (E8M0)."""
        return -127

    @property
    def exponent_max(self) -> int:
        """Largest log2 of a scale (E8M0)."""
        return 127

    def gap_at(self, exponent: int) -> float:
        """Gap around zero, and the smallest of a run, at the scale ``2**exponent``."""
        return self.element.smallest_subnormal * 2.0**exponent

    @property
    def max(self) -> float:
        """Largest value any run can hold."""
        return self.element.max * 2.0**self.exponent_max

    @property
    def min(self) -> float:
        """Smallest (most negative) value any run can hold."""
        return -self.max

    def __str__(self) -> str:
        text = f"mxfp{self.bits}{self.element}"
        text += f"b{self.block_size}" if self.block_size != 32 else ""
        return text + ("-fit" if self.scaling == "fit" else "")

    @classmethod
    def from_name(cls, name: str) -> MicroscalingFloat | None:
        """``"mxfp8e4m3"``: the bits of an element, and its fields; ``b16`` for other runs than of 32, ``-fit``.

        Raises:
            ValueError: If the bits are not those of the fields.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        bits, exponent, mantissa, size, fit = match.groups()
        fmt = cls(int(exponent), int(mantissa), int(size or 32), "fit" if fit else "floor")
        if fmt.bits != int(bits):
            raise ValueError(f"{name!r}: an element e{exponent}m{mantissa} has {fmt.bits} bits; write {str(fmt)!r}.")
        return fmt

    # ------------------------------------------------------------------------------------- what every format answers

    @property
    def blocks(self) -> Blocks:
        """Runs of ``block_size``."""
        return self._blocks

    @property
    def edge(self) -> float:
        """That of :attr:`element`."""
        return self.element.edge

    def demands(self, facts: DtypeFacts) -> tuple[int, int, int]:
        """As :meth:`.NumberFormat.demands`; the scale adapts to the dtype."""
        return self.mantissa_bits + 1, facts.lowest, facts.highest

    def exponent_range(self, dtype: torch.dtype) -> tuple[int, int]:
        """log2 of the smallest and largest scale of a run whose whole grid is representable in ``dtype``."""
        facts = DTYPES[dtype]
        high = facts.highest - self.element.exponent_max
        return max(self.exponent_min, facts.lowest - self._finest), min(self.exponent_max, high)

    @property
    def _finest(self) -> int:
        """log2 of the gap around zero less that of the scale."""
        return self.element.exponent_min - self.element.mantissa_bits

    # ----------------------------------------------------------------------------------------------------- its scales

    def _floor(self, largest: Tensor) -> Tensor:
        return exponent_of(largest) - self.element.exponent_max

    def _fit(self, largest: Tensor) -> Tensor:
        """Smallest scale at which ``largest`` does not saturate."""
        exponent = self._floor(largest)
        return exponent + (largest > self.element.max * power_of_two(exponent.clamp(min=-1022)))

    def _scale(self, largest: Tensor) -> Tensor:
        return self._fit(largest) if self.scaling == "fit" else self._floor(largest)

    def _largest(self, x: Tensor) -> Tensor:
        """Largest finite magnitude of every run, float64; infinity for one with infinities and nothing else but 0."""
        top = self.blocks.max(x.abs()).double()
        if x.device.type == "cpu" and bool(top.isfinite().all()):  # elsewhere the answer would have to be waited for
            return top
        finite = self.blocks.max(finite_magnitude(x)).double()
        alone = (finite == 0) & (self.blocks.max(x.isinf().to(x.dtype)) > 0)
        return torch.where(alone, torch.full_like(finite, torch.inf), finite)

    def _held(self, exponents: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """Exponents within what ``dtype`` can represent; the highest where there is nothing finite."""
        low, high = self.exponent_range(dtype)
        return torch.where(largest.isinf(), torch.full_like(exponents, high), exponents.clamp(low, high))

    def exponents(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """log2 of the scale of every run; ``x`` may be of any floating dtype."""
        largest = self._largest(x)
        return self._held(self._scale(largest), largest, dtype)

    def exponents_with_noise(self, mean: Tensor, sigma: float | Tensor, dtype: torch.dtype) -> Tensor:
        """Scales raised until the noise fits, while every variance stays reachable; any floating dtype.

        At a raised one the gap around zero is at most twice the smallest ``sigma`` of the run.
        """
        largest = self._largest(mean)
        if isinstance(sigma, Tensor):
            reach = self.blocks.max(finite_magnitude(mean) + NOISE_REACH * sigma)
            quietest = -self.blocks.max(-sigma, fill=-torch.inf)
        else:
            reach = torch.where(largest.isinf(), 0.0, largest + NOISE_REACH * sigma)
            quietest = torch.full_like(reach, sigma)
        wanted = torch.minimum(self._fit(reach), exponent_of(2.0 * quietest) - self._finest)
        return self._held(torch.maximum(self._scale(largest), wanted), largest, dtype)

    # ------------------------------------------------------------------------------------------------------- its grid

    def gap_exponents(self, x: Tensor, exponents: Tensor | None, sigma: Tensor | None = None) -> Tensor:
        """That of the element over its scale, and the scale's."""
        shift = self._shift(exponents, x)
        inverse = power_of_two(-shift)
        return self.element.gap_exponents(x * inverse, None, None if sigma is None else sigma * inverse) + shift

    def _shift(self, exponents: Tensor | None, x: Tensor) -> Tensor:
        assert exponents is not None
        return self.blocks.expand(exponents, x.shape)

    def code_limits(self, gap_exponents: Tensor, exponents: Tensor | None) -> Bounds:
        """Those of the element."""
        return self.element.code_limits(gap_exponents - self._shift(exponents, gap_exponents), None)

    def open_limits(self, gap_exponents: Tensor, exponents: Tensor | None, dtype: torch.dtype) -> Bounds:
        """Boundless below the largest scale where it is rounded up."""
        low, high = self.code_limits(gap_exponents, exponents)
        if self.scaling == "floor":
            return low, high
        open_ = self._shift(exponents, gap_exponents) < self.exponent_range(dtype)[1]
        return torch.where(open_, -BOUNDLESS, low), torch.where(open_, BOUNDLESS, high)

    def value_limits(self, x: Tensor, variance: float | Tensor = 0.0) -> tuple[float | Tensor, float | Tensor]:
        """As :meth:`.NumberFormat.value_limits`: those that Q^vc has for means ``x`` and ``variance``."""
        sigma = variance.double().expand(x.shape).sqrt() if isinstance(variance, Tensor) else variance**0.5
        exponents = self._shift(self.exponents_with_noise(x, sigma, x.dtype), x)
        top = self.element.max * power_of_two(exponents)
        if self.scaling == "fit":
            top = torch.where(exponents < self.exponent_range(x.dtype)[1], BOUNDLESS, top)
        return -top, top

    # ------------------------------------------------------------------------------------------------ the top of a run

    @property
    def clamps(self) -> bool:
        """Under ``"floor"``."""
        return self.scaling == "floor"

    @property
    def top_code(self) -> tuple[float, float]:
        """The largest value of an element, and the gap there."""
        return self.element.max, 2.0 ** (self.element.exponent_max - self.element.mantissa_bits)

    def unclamped(self) -> MicroscalingFloat:
        """The same with ``-fit``."""
        return replace(self, scaling="fit")

    @property
    def has_hole(self) -> bool:
        """Whether a run may not have every value of its grid as its largest magnitude; see :meth:`settled`."""
        return self.scaling == "floor" and self.element.specials == "nan"

    def carried_with_noise(
        self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None, dtype: torch.dtype, coins: Coins
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Runs beyond their scale are taken to the next one, or out of the hole below the next power of two."""
        assert exponents is not None
        if self.scaling == "fit":
            values, exponents = self.raised(codes * power_of_two(gap_exponents), exponents, dtype, coins)
        elif self.has_hole:
            values = codes.clamp(*self.code_limits(gap_exponents, exponents)) * power_of_two(gap_exponents)
            values = self.settled(values, dtype, (coins("hole") < 2**31).double())
        else:
            return codes, gap_exponents, exponents
        return values * power_of_two(-gap_exponents), gap_exponents, exponents

    def raised(self, values: Tensor, exponents: Tensor, dtype: torch.dtype, coins: Coins) -> tuple[Tensor, Tensor]:
        """A larger scale where a value passes the largest of its run's grid; of a format that rounds scales up.

        A float keeps its value under a larger scale unless it is next to zero, where the gap grows: there it is rounded
        stochastically, by the element's word.

        Args:
            values: Values on the grids of ``exponents``, float64, not clamped; NaN and infinities take no part.
            exponents: log2 of the scales, compact shape.
            dtype: dtype of the result, which bounds the scales.
            coins: Words for draws of their own.

        Returns:
            Values and scales; only runs of the largest scale may still have values beyond their grid.
        """
        finite = torch.where(values.isfinite(), values, 0.0)
        raised = torch.maximum(exponents, self.exponents(finite, dtype))
        if values.device.type == "cpu" and not bool((raised > exponents).any()):
            return values, exponents
        u = (coins("carry").double() + 0.5) * 2.0**-32
        shift = self.blocks.expand(raised, values.shape)
        own = exponent_of(finite.abs()).clamp(min=-1000)
        gap = power_of_two(torch.maximum(own, shift + self.element.exponent_min) - self.element.mantissa_bits)
        moved = (finite / gap + u).floor() * gap  # what is on the grid stays: u < 1
        grown = self.blocks.expand(raised > exponents, values.shape) & values.isfinite()
        return torch.where(grown, moved, values), raised

    def fitted(self, values: Tensor, exponents: Tensor, dtype: torch.dtype, coins: Coins) -> Tensor:
        """Values of :meth:`raised`, saturated at the end of the last scale (infinities: of their run's)."""
        values, exponents = self.raised(values, exponents, dtype, coins)
        top = self.blocks.expand(self.element.max * power_of_two(exponents), values.shape)
        return values.clamp(-top, top)

    def in_hole(self, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For every run, whether its largest magnitude would saturate when met again; and log2 of its scale then."""
        exponents = self.exponents(values, dtype)
        return self._largest(values) > self.element.max * power_of_two(exponents), exponents

    def settled(self, values: Tensor, dtype: torch.dtype, coin: Tensor) -> Tensor:
        """Move values that the format would saturate when it meets them again; fair, so the mean stays.

        Under ``"floor"`` a run of e4m3 cannot have a largest magnitude of 1.875 times a power of two, because that code
        is NaN there. Noise at a raised scale may land on it: it then goes to 1.75 or to 2 times the power of two. No
        other element type has such a hole, and ``"fit"`` has none.

        Args:
            values: Values on the grid of some scale, of a format that :attr:`has_hole`.
            dtype: dtype of the result.
            coin: 0 (towards zero) or 1, shape of ``values``.
        """
        lost, exponents = self.in_hole(values, dtype)
        top = torch.where(lost, self.element.max * power_of_two(exponents), torch.inf).to(values.dtype)
        next_power = power_of_two(exponents + (self.element.exponent_max + 1)).to(values.dtype)
        top, next_power = (self.blocks.expand(ends, values.shape) for ends in (top, next_power))
        return torch.where(values.abs() > top, torch.where(coin > 0, next_power, top).copysign(values), values)

    def doublings(
        self, scaled: Tensor, gap_exponents: Tensor, scales: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`.NumberFormat.doublings`: only gaps next to zero grow, and one larger scale is followed."""
        assert scales is not None
        shift = scales.expand(scaled.shape)
        own = gap_exponents - shift
        room = (self.exponent_range(dtype)[1] - shift).clamp(0, 1) * (self.scaling == "fit")
        top = self.element.max * power_of_two(-own)
        coarser = (own == self._finest) & (scaled.abs() < self.edge)
        return top.expand(scaled.shape), room.expand(scaled.shape), coarser.expand(scaled.shape)

    # ------------------------------------------------------------------------------------------------------ its codes

    def pack(self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None) -> Tensor:
        """Bit patterns of the elements over their scales."""
        return self.element.pack(codes, gap_exponents - self._shift(exponents, codes), None)

    def unpack(self, codes: Tensor, exponents: Tensor | None) -> Tensor:
        """Values of the elements times their scales."""
        assert exponents is not None
        return self.element.unpack(codes, None) * power_of_two(self._shift(exponents.long(), codes))

    def kernel(self, dtype: torch.dtype) -> KernelIdentity:
        """Family ``"scaled"``: numbers of the element, and of its scales."""
        low, high = self.exponent_range(dtype)
        own, size, fits, hole = self.element.kernel(dtype), self.block_size, self.scaling == "fit", self.has_hole
        return replace(own, run=size, scale_low=low, scale_high=high, fits=fits, hole=hole)

    def small_case(self, length: int) -> tuple[tuple[int, ...], MicroscalingFloat]:
        """Two rows of two runs, whatever the kernel for the elements sees."""
        return (2, 2 * self.block_size), self

    def to_qtorch(self) -> object:
        """Refused.

        Raises:
            ValueError: Always; QPyTorch has no shared scales of floats.
        """
        raise ValueError(f"QPyTorch's floats share no scale; it has no {self}.")
