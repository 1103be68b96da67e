"""What a fused kernel must know of a format, as numbers: by it a backend chooses, and says what it can."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KernelIdentity"]


@dataclass(frozen=True)
class KernelIdentity:
    r"""A format in the terms of the kernels: codes, and a gap of :math:`2^{e + \text{offset}}` at exponent e.

    A backend has a table of families (:attr:`.NumberFormat.family`): ``"fixed"``, one gap; ``"block"``, one exponent a
    block, from its largest magnitude; ``"float"``, an exponent an element, with subnormals; ``"scaled"``, such floats
    over a power of two that a run of a row shares, all other numbers being those of an element. A format of a known
    family is one whose values and whose rounding are fully told by the numbers here, and whose blocks, unless they are
    runs of scaled floats, are runs of equal length (:meth:`.Blocks.run_length`); a backend without the family leaves
    the call to the reference.

    Attributes:
        offset: log2 of the gap less the exponent.
        low: Smallest exponent.
        high: Largest exponent.
        code_min: Smallest code in units of the gap.
        code_max: Largest code; of floats, that of the next power of two.
        min: Smallest value; of blocks, of any block.
        max: Largest value.
        carries: Whether a block whose code passes the largest takes the next exponent.
        mantissa_bits: Of floats.
        exponent_bits: Of floats.
        bias: Of floats.
        has_nan: Whether the codes have a NaN.
        top_pattern: Bit pattern of the largest finite float.
        run: Of scaled floats, elements of a run (the last of a row may have fewer).
        scale_low: log2 of their smallest scale.
        scale_high: log2 of their largest scale.
        fits: Whether scales are rounded up, so that nothing saturates.
        hole: Whether a code is missing below the next power of two.
    """

    offset: int
    low: int
    high: int
    code_min: int
    code_max: int
    min: float
    max: float
    carries: bool = False
    mantissa_bits: int = 0
    exponent_bits: int = 0
    bias: int = 0
    has_nan: bool = False
    top_pattern: int = 0
    run: int = 0
    scale_low: int = 0
    scale_high: int = 0
    fits: bool = False
    hole: bool = False
