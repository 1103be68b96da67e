"""Microscaling floats (OCP MX): small floating-point elements that share a power-of-two scale per run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_lpsgld.formats.numbers import FloatingPoint, require_int

__all__ = ["MicroscalingFloat", "Scaling"]

Scaling = Literal["floor", "fit"]

#: (exponent bits, mantissa bits) of the floating element types of OCP MX v1.0, table 1, and their formats.
_ELEMENTS = {(e, m): FloatingPoint(e, m) for e, m in ((4, 3), (5, 2), (3, 2), (2, 3), (2, 1))}


@dataclass(frozen=True)
class MicroscalingFloat:
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
