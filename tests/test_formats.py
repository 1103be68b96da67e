"""Formats are data: facts follow from fields; strings and QPyTorch numbers are other spellings of the same object."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from helpers import oracle

from lightning_lpsgld.formats import (
    BlockFloatingPoint,
    BlockFormat,
    FixedPoint,
    FloatingPoint,
    MicroscalingFloat,
    check_dtype,
    code_dtype,
    numbers,
    parse_format,
    to_qtorch,
    with_word_length,
)

FIXED = [FixedPoint(w, f, s) for w in (2, 4, 8, 16, 24) for f in (-3, 0, 3, 8, 30) for s in (False, True)]
FLOATS = [FloatingPoint(e, m, s) for e in range(2, 9) for m in (1, 2, 3, 7) for s in (None, "ieee", "nan", "none")]
FLOATS += [FloatingPoint(8, 23), FloatingPoint(5, 10), FloatingPoint(8, 10)]
BLOCKS = [BlockFloatingPoint(w, d, e) for w in (2, 4, 8, 16, 24) for d in (0, 1, 3, -1, -2, None) for e in (2, 5, 8)]
BLOCKS += [BlockFloatingPoint(w, block_size=b, exponent_bits=e) for w in (4, 8) for b in (1, 16, 32) for e in (4, 8)]
BLOCKS += [replace(fmt, top="clamp") for fmt in BLOCKS]
ELEMENTS = [(4, 3), (5, 2), (3, 2), (2, 3), (2, 1)]
MICRO = [MicroscalingFloat(*e, b, s) for e in ELEMENTS for b in (1, 16, 32, 100) for s in ("floor", "fit")]
EVERY = FIXED + FLOATS + BLOCKS + MICRO


@pytest.mark.parametrize("fmt", EVERY, ids=repr)
def test_string_is_another_spelling(fmt):
    assert parse_format(str(fmt)) == fmt
    assert parse_format(f"  {str(fmt).upper()} ") == fmt
    assert parse_format(fmt) is fmt
    assert hash(parse_format(str(fmt))) == hash(fmt)


def test_strings_are_unique():
    assert len({str(fmt) for fmt in EVERY}) == len(set(EVERY))


@pytest.mark.parametrize("fmt", [f for f in FIXED if f.word_length <= 8], ids=str)
def test_facts_of_fixed_point(fmt):
    grid = oracle.fixed_grid(fmt)
    assert (fmt.min, fmt.max) == (grid[0], grid[-1])
    assert {b - a for a, b in pairwise(grid)} == {Fraction(fmt.gap)}
    assert len(grid) == fmt.code_max - fmt.code_min + 1 == 2**fmt.bits - fmt.symmetric


@pytest.mark.parametrize("fmt", [f for f in FLOATS if f.bits <= 9], ids=str)
def test_facts_of_floating_point(fmt):
    grid = oracle.float_grid(fmt)
    positive = [v for v in grid if v > 0]
    assert (fmt.min, fmt.max, fmt.smallest_subnormal) == (grid[0], grid[-1], positive[0])
    assert fmt.smallest_normal == positive[2**fmt.mantissa_bits - 1]
    assert fmt.exponent_max == oracle.floor_log2(grid[-1])


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        ("e4m3", torch.float8_e4m3fn),
        ("e5m2", torch.float8_e5m2),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("fp32", torch.float32),
    ],
)
def test_facts_agree_with_those_of_torch(fmt, dtype):
    number, facts = parse_format(fmt), torch.finfo(dtype)
    assert (number.max, number.min, number.smallest_normal) == (facts.max, facts.min, facts.smallest_normal)
    assert number.bits == facts.bits
    assert 2.0**-number.mantissa_bits == facts.eps


@pytest.mark.parametrize("fmt", [f for f in BLOCKS if f.word_length <= 8], ids=str)
def test_facts_of_block_floating_point(fmt):
    for exponent in (fmt.exponent_min, 0, fmt.exponent_max):
        grid = oracle.block_grid(exponent, fmt)
        assert Fraction(fmt.gap_at(exponent)) == grid[1] - grid[0]
        assert oracle.floor_log2(grid[-1]) == exponent
    assert (fmt.min, fmt.max) == (grid[0], grid[-1])
    assert fmt.code_min == -fmt.code_max


@pytest.mark.parametrize(
    ("name", "largest_normal", "smallest_subnormal", "largest_power"),
    [
        ("mxfp8e5m2", 57344.0, 2.0**-16, 2.0**15),
        ("mxfp8e4m3", 448.0, 2.0**-9, 2.0**8),
        ("mxfp6e3m2", 28.0, 2.0**-4, 2.0**4),
        ("mxfp6e2m3", 7.5, 2.0**-3, 2.0**2),
        ("mxfp4e2m1", 6.0, 0.5, 2.0**2),
    ],
)
def test_facts_of_microscaling_elements_are_those_of_the_specification(
    name, largest_normal, smallest_subnormal, largest_power
):
    """OCP MX v1.0, sections 5.3.1 to 5.3.3."""
    fmt = parse_format(name)
    assert (fmt.element.max, fmt.gap_at(0), 2.0**fmt.element.exponent_max) == (
        largest_normal,
        smallest_subnormal,
        largest_power,
    )
    assert fmt.block_size == 32
    assert fmt.bits == int(name[4])
    assert (fmt.exponent_min, fmt.exponent_max) == (-127, 127)
    assert (fmt.max, fmt.min) == (largest_normal * 2.0**127, -largest_normal * 2.0**127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", [f for f in MICRO if f.block_size == 32], ids=str)
def test_scale_range_of_a_run_is_what_the_dtype_holds(fmt, dtype):
    """At both ends of the range every value of the run survives; one exponent further the dtype or E8M0 ends."""
    check_dtype(fmt, dtype)
    low, high = fmt.exponent_range(dtype)
    for exponent in (low, high):
        grid = torch.tensor([float(v) for v in oracle.run_grid(exponent, fmt)], dtype=torch.float64)
        assert torch.equal(grid.to(dtype).double(), grid)
    for exponent, end in ((low - 1, -128), (high + 1, 128)):
        grid = torch.tensor([float(v) for v in oracle.run_grid(exponent, fmt)], dtype=torch.float64)
        assert exponent == end or not torch.equal(grid.to(dtype).double(), grid)


def test_published_ranges():
    """(8,3) has gap 1/8 and [-16, 15.875], (8,4) 1/16 and [-8, 7.9375], (8,8) 1/256 and [-0.5, 0.49609375]."""
    for f, gap, low, high in ((3, 1 / 8, -16, 15.875), (4, 1 / 16, -8, 7.9375), (8, 1 / 256, -0.5, 0.49609375)):
        fmt = FixedPoint(8, f)
        assert (fmt.gap, fmt.min, fmt.max) == (gap, low, high)


@pytest.mark.parametrize(
    ("alias", "fmt"),
    [
        ("fp32", FloatingPoint(8, 23)),
        ("tf32", FloatingPoint(8, 10)),
        ("bf16", FloatingPoint(8, 7)),
        ("fp16", FloatingPoint(5, 10)),
        ("mxint8", BlockFloatingPoint(8, block_size=32)),
        ("mxint16", BlockFloatingPoint(16, block_size=32)),
        ("mxint8-clamp", BlockFloatingPoint(8, block_size=32, top="clamp")),
        ("bfp8-tensor-clamp", BlockFloatingPoint(8, None, top="clamp")),
        ("mxfp4", MicroscalingFloat(2, 1)),
        ("mxfp8e4m3b16-fit", MicroscalingFloat(4, 3, 16, "fit")),
        ("fixed8.-2", FixedPoint(8, -2)),
        ("bfp8-dim-1e5", BlockFloatingPoint(8, -1, 5)),
    ],
)
def test_aliases(alias, fmt):
    assert parse_format(alias) == fmt


def test_formats_are_frozen():
    for fmt in (FixedPoint(8, 6), BlockFloatingPoint(8), FloatingPoint(4, 3), MicroscalingFloat(4, 3)):
        with pytest.raises(AttributeError):
            fmt.word_length = 4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FixedPoint(1, 0), ValueError, r"FixedPoint: `word_length` must be in \[2, 24\], got 1"),
        (lambda: FixedPoint(25, 0), ValueError, "got 25"),
        (lambda: FixedPoint(8, 121), ValueError, "`fraction_length` must be in"),
        (lambda: FixedPoint(8.0, 6), TypeError, "`word_length` must be an int, got 8.0"),
        (lambda: FixedPoint(True, 6), TypeError, "must be an int, got True"),
        (lambda: BlockFloatingPoint(1), ValueError, r"BlockFloatingPoint: `word_length` must be in \[2, 24\]"),
        (lambda: BlockFloatingPoint(8, exponent_bits=9), ValueError, r"`exponent_bits` must be in \[2, 8\], got 9"),
        (lambda: BlockFloatingPoint(8, "row"), TypeError, "`block_dim` must be an int, got 'row'"),
        (
            lambda: BlockFloatingPoint(8, top="wrap"),
            ValueError,
            r"`top` must be one of \('carry', 'clamp'\), got 'wrap'",
        ),
        (lambda: BlockFloatingPoint(8, block_size=0), ValueError, "`block_size` must be in"),
        (lambda: BlockFloatingPoint(8, 1, block_size=32), ValueError, "excludes `block_dim`, got 1"),
        (lambda: BlockFloatingPoint(8, None, block_size=32), ValueError, "excludes `block_dim`, got None"),
        (lambda: FloatingPoint(1, 3), ValueError, r"FloatingPoint: `exponent_bits` must be in \[2, 8\], got 1"),
        (lambda: FloatingPoint(4, 0), ValueError, "`mantissa_bits` must be in"),
        (lambda: FloatingPoint(4, 3, "inf"), ValueError, "`specials` must be 'ieee', 'nan' or 'none', got 'inf'"),
        (lambda: MicroscalingFloat(3, 4), ValueError, r"one of e4m3, e5m2, e3m2, e2m3, e2m1, got \(3, 4\)"),
        (lambda: MicroscalingFloat(4.0, 3), TypeError, "MicroscalingFloat: `exponent_bits` must be an int, got 4.0"),
        (lambda: MicroscalingFloat(4, 3, 0), ValueError, r"`block_size` must be in \[1, 1048576\], got 0"),
        (lambda: MicroscalingFloat(4, 3, scaling="ceil"), ValueError, r"`scaling` must be one of .*, got 'ceil'"),
        (lambda: parse_format("mxfp6e4m3"), ValueError, "e4m3 has 8 bits; write 'mxfp8e4m3'"),
        (lambda: parse_format("mxfp8e3m4"), ValueError, "got \\(3, 4\\)"),
        (lambda: with_word_length(MicroscalingFloat(4, 3), 6), TypeError, "mxfp8e4m3 has no word length"),
        (lambda: parse_format("int8"), ValueError, "No number format is called 'int8'; use 'fixed"),
        (lambda: parse_format("fixed8"), ValueError, "'fixed8'"),
        (lambda: parse_format("bfp8b32-tensor"), ValueError, "'bfp8b32-tensor'"),
        (lambda: parse_format("fixed99.1"), ValueError, "got 99"),
        (lambda: parse_format(8), TypeError, "or a qtorch number; got 8"),
        (lambda: parse_format(None), TypeError, "got None"),
        (lambda: with_word_length(FloatingPoint(4, 3), 6), TypeError, "e4m3 has no word length"),
    ],
)
def test_errors_name_field_rule_and_value(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ------------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize(
    ("fmt", "dtype", "fits"),
    [
        ("fixed8.6", torch.bfloat16, True),
        ("fixed9.6", torch.bfloat16, True),
        ("fixed10.6", torch.bfloat16, False),
        ("fixed12.6", torch.float16, True),
        ("fixed13.6", torch.float16, False),
        ("fixed8.24", torch.float16, True),
        ("fixed8.25", torch.float16, False),
        ("fixed8.-8", torch.float16, True),
        ("fixed8.-9", torch.float16, False),
        ("fixed24.20", torch.float32, True),
        ("bfp9", torch.bfloat16, True),
        ("bfp10", torch.bfloat16, False),
        ("bfp24", torch.float32, True),
        ("bfp13", torch.float16, False),
        ("bf16", torch.bfloat16, True),
        ("bf16", torch.float16, False),
        ("fp16", torch.bfloat16, False),
        ("fp16", torch.float16, True),
        ("e5m2", torch.float16, True),
        ("e8m3", torch.float32, True),
        ("fp32", torch.float32, True),
        ("fp32", torch.float64, True),
    ],
)
def test_formats_wider_than_the_dtype_are_refused(fmt, dtype, fits):
    if fits:
        check_dtype(parse_format(fmt), dtype)
        return
    with pytest.raises(
        ValueError, match=rf"{parse_format(fmt)} is wider than {dtype}: it needs \d+ significand bits.*wider dtype"
    ):
        check_dtype(parse_format(fmt), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", [f for f in FIXED + FLOATS if f.bits <= 8], ids=str)
def test_what_check_dtype_accepts_the_dtype_holds(fmt, dtype):
    """Accepted if and only if every value of the grid survives the cast to the dtype."""
    grid = torch.tensor([float(v) for v in oracle.grid_of(fmt)], dtype=torch.float64)
    survives = torch.equal(grid.to(dtype).double(), grid)
    try:
        check_dtype(fmt, dtype)
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == survives


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", [f for f in BLOCKS if f.word_length <= 8], ids=str)
def test_exponent_range_of_a_block_is_what_the_dtype_holds(fmt, dtype):
    """At both ends of the range every value of the block survives; one exponent below it the dtype or the bits end."""
    low, high = fmt.exponent_range(dtype)
    for exponent in (low, high):
        grid = torch.tensor([float(v) for v in oracle.block_grid(exponent, fmt)], dtype=torch.float64)
        assert torch.equal(grid.to(dtype).double(), grid)
    assert low == oracle.block_exponent(Fraction(0), fmt, dtype)
    assert high == oracle.block_exponent(Fraction(2) ** 2000, fmt, dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"got {dtype}"):
        check_dtype(FixedPoint(8, 6), dtype)


def test_codes_take_the_smallest_dtype():
    formats = ("fixed4.2", "bfp8", "e4m3", "fixed9.4", "bf16", "bfp16", "fixed17.9", "fp32")
    expected = [torch.int8] * 3 + [torch.int16] * 3 + [torch.int32] * 2
    assert [code_dtype(parse_format(fmt)) for fmt in formats] == expected


def test_another_word_length_keeps_the_range():
    assert with_word_length(FixedPoint(8, 6), 4) == FixedPoint(4, 2)
    assert with_word_length(FixedPoint(8, 6, True), 16) == FixedPoint(16, 14, True)
    assert with_word_length(BlockFloatingPoint(8, block_size=32), 4) == BlockFloatingPoint(4, block_size=32)


# ------------------------------------------------------------------------------------------------------ QPyTorch


def qtorch_fits(fmt):
    if isinstance(fmt, FixedPoint):
        return fmt.fraction_length >= 1
    if isinstance(fmt, MicroscalingFloat):
        return False
    if isinstance(fmt, BlockFloatingPoint):
        return fmt.top == "clamp" and fmt.block_size is None and fmt.exponent_bits == 8 and (fmt.block_dim or 0) >= 0
    return fmt == FloatingPoint(fmt.exponent_bits, fmt.mantissa_bits)


@pytest.mark.parametrize("fmt", [f for f in EVERY if qtorch_fits(f)], ids=repr)
def test_qtorch_numbers_both_ways(fmt):
    number = to_qtorch(fmt)
    assert type(number).__module__.startswith("qtorch")
    assert parse_format(number) == fmt


@pytest.mark.parametrize(
    "fmt", ["fixed8.0", "fixed8.-1", "bfp8", "bfp8b32-clamp", "bfp8e4-clamp", "bfp8-dim-1-clamp", "mxfp8e4m3"]
)
def test_what_qtorch_lacks_is_refused(fmt):
    with pytest.raises(ValueError, match="QPyTorch"):
        to_qtorch(fmt)


def test_unknown_qtorch_numbers_are_refused():
    from qtorch.number import Number

    class Posit(Number):
        __module__ = "qtorch.number"

        def __str__(self):
            return "posit"

        __repr__ = __str__

    with pytest.raises(TypeError, match="No equivalent for the qtorch number posit"):
        parse_format(Posit())


@pytest.mark.parametrize("text", ["fixed8.6", "bfp8b32-clamp", "e4m3-none", "mxfp8e4m3-fit"])
def test_formats_survive_pickles_and_copies(text):
    """Also those that were pickled as their fields alone, by the module in which they stood then."""
    fmt = parse_format(text)
    old = type(fmt).__new__(type(fmt))
    state = {field.name: getattr(fmt, field.name) for field in fields(fmt)}
    old.__setstate__(state) if isinstance(fmt, BlockFormat) else old.__dict__.update(state)
    for other in (pickle.loads(pickle.dumps(fmt)), copy.deepcopy(fmt), old):
        assert other == fmt
        assert hash(other) == hash(fmt)
        assert other.blocks.compact((3, 64)) == fmt.blocks.compact((3, 64))
    assert isinstance(fmt, MicroscalingFloat) or getattr(numbers, type(fmt).__name__) is type(fmt)
