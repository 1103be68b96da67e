"""Rounding to a grid against exact rational arithmetic: no statistics here.

Inputs are every value of every 8-bit format, every midpoint, and the neighbours of all these in the input's dtype.
Stochastic rounding is exact too once its uniforms are known: up if and only if u < p.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from helpers import oracle
from helpers.backends import runs

from lightning_lpsgld.formats import (
    BlockFloatingPoint,
    BlockFormat,
    FixedPoint,
    FloatingPoint,
    MicroscalingFloat,
    parse_format,
)
from lightning_lpsgld.ops import decode, encode, quantize, quantize_variance_corrected
from lightning_lpsgld.ops.carry import carry_key
from lightning_lpsgld.ops.reference import exponent_of, power_of_two
from lightning_lpsgld.random import DrawKey, uniforms, words

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FIXED = [FixedPoint(8, f) for f in range(9)] + [FixedPoint(8, 6, symmetric=True), FixedPoint(8, -2), FixedPoint(4, 2)]
FLOATS = [FloatingPoint(e, 7 - e) for e in (2, 3, 4, 5)] + [FloatingPoint(4, 3, "ieee"), FloatingPoint(2, 1)]
BLOCKS = [
    BlockFloatingPoint(8),
    BlockFloatingPoint(8, block_dim=1),
    BlockFloatingPoint(8, block_dim=-1),
    BlockFloatingPoint(8, block_dim=None),
    BlockFloatingPoint(8, block_size=3),
    BlockFloatingPoint(8, exponent_bits=4),
    BlockFloatingPoint(4),
    BlockFloatingPoint(2),
    BlockFloatingPoint(8, top="clamp"),
    BlockFloatingPoint(8, block_size=3, top="clamp"),
]
MICRO = [MicroscalingFloat(4, 3, 4), MicroscalingFloat(5, 2, scaling="fit"), MicroscalingFloat(2, 1, 3)]
ALL = FIXED + FLOATS + BLOCKS + MICRO
KEY = DrawKey(seed=11, step=5, stream=3)
by_name = {"ids": str}


def fractions(x):
    return [Fraction(v) for v in x.double().tolist()]


def same_bits(a, b):
    """Equal including NaN, and no negative zero in either."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert not ((a == 0) & a.signbit()).any()
    assert torch.equal(a.isnan(), b.isnan())
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def assert_values(got, expected, x):
    wrong = [(i, float(x[i]), g, float(e)) for i, (g, e) in enumerate(zip(got.double().tolist(), expected)) if g != e]
    assert not wrong, f"{len(wrong)} of {len(x)} wrong; (index, input, got, expected): {wrong[:5]}"


def expected_stochastic(x, grid, u):
    out = []
    for value, draw in zip(fractions(x), fractions(u)):
        lower, upper, p = oracle.split(value, grid)
        out.append(upper if draw < p else lower)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FIXED + FLOATS, **by_name)
def test_every_code_and_its_neighbours(fmt, dtype, backend):
    """All values of the grid, midpoints and neighbours: nearest with ties to even, stochastic given the draws."""
    grid = oracle.grid_of(fmt)
    x = oracle.candidates(grid, dtype)
    runs(backend, "quantize", x, fmt)
    nearest = quantize(x, fmt, rounding="nearest", backend=backend)
    assert_values(nearest, [oracle.nearest(v, grid) for v in fractions(x)], x)
    stochastic = quantize(x, fmt, key=KEY, backend=backend)
    assert_values(stochastic, expected_stochastic(x, grid, uniforms(x.shape, KEY)), x)


def block_exponents(fmt, dtype):
    """Both clamps and beyond, subnormal blocks, and ordinary ones."""
    facts = torch.finfo(dtype)
    smallest, largest = (oracle.floor_log2(Fraction(v)) for v in (facts.smallest_normal * facts.eps, facts.max))
    wanted = {smallest, smallest + 3, smallest + 6, smallest + 7, smallest + 9, -7, -1, 0, 1, 5, largest - 1, largest}
    wanted |= {-(2 ** (fmt.exponent_bits - 1)) + d for d in (-3, -1, 0, 1)}
    wanted |= {2 ** (fmt.exponent_bits - 1) - 1 + d for d in (-1, 0)}
    return sorted(e for e in wanted if smallest <= e <= largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fmt",
    [
        BlockFloatingPoint(8),
        BlockFloatingPoint(8, exponent_bits=4),
        BlockFloatingPoint(4),
        BlockFloatingPoint(8, top="clamp"),
        BlockFloatingPoint(8, exponent_bits=4, top="clamp"),
    ],
    **by_name,
)
def test_every_code_of_a_block_and_its_neighbours(fmt, dtype, backend):
    """One row a block: its anchor 2**E, then all codes at that exponent, midpoints and neighbours."""
    for exponent in block_exponents(fmt, dtype):
        anchor = 2.0**exponent
        around = oracle.candidates(oracle.block_grid(exponent, fmt), dtype)
        inside = around[around.abs().double() < 2 * anchor]
        x = torch.cat([torch.tensor([anchor], dtype=torch.float64).to(dtype), inside])[None]
        runs(backend, "quantize", x, fmt)
        below = x[:, x[0].abs().double() < 2 * anchor * (1 - 2.0 ** (1 - fmt.word_length))]
        for case in (x, below):  # with and without what may pass the top
            values, coins = fractions(case[0]), words(case.shape, carry_key(KEY))[0].tolist()
            nearest = quantize(case, fmt, rounding="nearest", backend=backend)
            assert_values(nearest[0], oracle.block_rounded(values, fmt, dtype, None)[0], case[0])
            stochastic = quantize(case, fmt, key=KEY, backend=backend)
            draws = fractions(uniforms(case.shape, KEY)[0])
            assert_values(stochastic[0], oracle.block_rounded(values, fmt, dtype, draws, coins)[0], case[0])


def rows_of_blocks(shape, fmt):
    """Index of the block of every element, spelled out with loops over indices."""
    out = torch.zeros(shape, dtype=torch.long)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).tolist():
        if fmt.block_size is not None:
            flat = sum(i * math.prod(shape[d + 1 : -1]) for d, i in enumerate(index[:-1]))
            label = flat * 10_000 + index[-1] // fmt.block_size
        else:
            label = 0 if fmt.block_dim is None else index[fmt.block_dim]
        out[tuple(index)] = label
    return out


@pytest.mark.parametrize("shape", [(5,), (3, 7), (4, 3, 5), (2, 3, 4, 5)], **by_name)
@pytest.mark.parametrize("fmt", BLOCKS, **by_name)
def test_blocks_of_every_shape(fmt, shape, backend, generator):
    """Elements that share an exponent are those that the documentation says, for every block layout."""
    if fmt.block_dim == 1 and len(shape) == 1:
        pytest.skip("a 1-D tensor has no dim 1")
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-9, 9, shape, generator=generator)
    runs(backend, "quantize", x, fmt)
    expected, label = torch.zeros(shape), rows_of_blocks(shape, fmt)
    for block in label.unique():
        values = fractions(x[label == block])
        expected[label == block] = torch.tensor([float(v) for v in oracle.block_rounded(values, fmt, x.dtype, None)[0]])
    assert torch.equal(quantize(x, fmt, rounding="nearest", backend=backend), expected)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_floating_point_agrees_with_the_casts_of_torch(fmt, dtype, backend, generator):
    """Inside the range, nearest rounding is the cast; random bit patterns reach every binade and the subnormals."""
    x = torch.randint(-(2**31), 2**31, (400_000,), generator=generator).int().view(torch.float32)
    x = torch.cat(
        [x, torch.randn(100_000, generator=generator) * 2.0 ** torch.randint(-30, 18, (100_000,), generator=generator)]
    )
    x = x[x.isfinite() & (x.abs() <= parse_format(fmt).max)]
    runs(backend, "quantize", x, fmt)
    assert torch.equal(quantize(x, fmt, rounding="nearest", backend=backend), x.to(dtype).float() + 0.0)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_bit_patterns_of_encode_are_those_of_torch(fmt, backend):
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[fmt]
    patterns = torch.arange(-128, 128).to(torch.int8)
    values = patterns.view(dtype).float()
    keep = values.isfinite() & ~((values == 0) & values.signbit())
    runs(backend, "encode", values, fmt)
    assert torch.equal(encode(values[keep], fmt, backend=backend).codes, patterns[keep])


# ------------------------------------------------------------------------------------------- contracts of all formats


def awkward(dtype, generator):
    """Many magnitudes, zeros, a zero row, a subnormal row, huge values, values on grids."""
    x = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    x *= 2.0 ** torch.randint(-12, 12, (12, 9), generator=generator)
    x[1], x[2, ::2] = 0.0, 0.0
    x[3] = torch.finfo(dtype).smallest_normal * torch.rand(9, generator=generator, dtype=torch.float64)
    x[4] = torch.finfo(dtype).max * torch.linspace(-1, 1, 9, dtype=torch.float64)
    x[5] = torch.linspace(-2, 2, 9)
    return x.to(dtype)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ALL, **by_name)
class TestEveryFormat:
    def test_quantizing_twice_changes_nothing(self, fmt, dtype, rounding, backend, generator):
        x = awkward(dtype, generator)
        runs(backend, "quantize", x, fmt)
        once = quantize(x, fmt, rounding=rounding, key=KEY, backend=backend)
        for step in range(20):
            assert same_bits(quantize(once, fmt, rounding=rounding, key=KEY.at(step=step), backend=backend), once)
        assert same_bits(quantize(once, fmt, rounding="nearest", backend=backend), once)

    def test_decode_of_encode_is_quantize(self, fmt, dtype, rounding, backend, generator):
        x = awkward(dtype, generator)
        runs(backend, "encode", x, fmt)
        encoded = encode(x, fmt, rounding=rounding, key=KEY, backend=backend)
        rounded = quantize(x, fmt, rounding=rounding, key=KEY, backend=backend)
        assert same_bits(decode(encoded, dtype, backend=backend), rounded)
        assert same_bits(decode(encoded, torch.float64), rounded.double())
        assert encoded.codes.dtype == (torch.int8 if fmt.bits <= 8 else torch.int16)
        again = encode(rounded, fmt, rounding="nearest", backend=backend)
        assert same_bits(decode(again, dtype, backend=backend), rounded)

    def test_layouts_and_empty_tensors(self, fmt, dtype, rounding, backend, generator):
        """The result depends on the logical tensor only; it keeps shape and dtype."""
        base = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
        runs(backend, "quantize", base, fmt)
        options = {"rounding": rounding, "key": KEY, "backend": backend}
        expected = quantize(base, fmt, **options)
        strided = torch.empty(2, 3, 4, 10, dtype=dtype)[..., ::2].copy_(base)
        transposed = base.transpose(1, 2).contiguous().transpose(1, 2)
        for same in (base.contiguous(memory_format=torch.channels_last), strided, transposed, base[:].requires_grad_()):
            got = quantize(same, fmt, **options)
            assert same_bits(got, expected)
            assert not got.requires_grad
            codes = encode(same, fmt, **options)
            assert same_bits(decode(codes, dtype, backend=backend), expected)
        for shape in ((0,), (0, 4), (4, 0)):
            if shape == (0,) and getattr(fmt, "block_dim", 0) == 1:
                continue
            empty = torch.empty(shape, dtype=dtype)
            assert quantize(empty, fmt, **options).shape == shape
            assert decode(encode(empty, fmt, **options), dtype).shape == shape

    def test_input_is_not_modified(self, fmt, dtype, rounding, backend, generator):
        x = awkward(dtype, generator)
        runs(backend, "quantize", x, fmt)
        kept = x.clone()
        quantize(x, fmt, rounding=rounding, key=KEY, backend=backend)
        encode(x, fmt, rounding=rounding, key=KEY, backend=backend)
        assert torch.equal(x, kept)

    def test_monotone_given_the_same_draw(self, fmt, dtype, rounding, backend, generator):
        """x <= y implies Q(x) <= Q(y) for the same draw; in blocks at one exponent (each has an anchor)."""
        x = torch.rand(2, 64, 3, generator=generator, dtype=torch.float64) * 3.9 - 1.9
        nudge = torch.rand(2, 64, 3, generator=generator, dtype=torch.float64) ** 8 * 0.1
        low, high = x.clamp(max=1.9).to(dtype), (x + nudge).clamp(max=1.95).to(dtype)
        high = torch.maximum(low, high)
        for anchored in (low, high):  # one value in [1, 2) in every block of every layout
            anchored[:, :, 2] = anchored[:, 5, :] = anchored[0] = 1.96875
        runs(backend, "quantize", low, fmt)
        got = [quantize(v, fmt, rounding=rounding, key=KEY, backend=backend).double() for v in (low, high)]
        assert (got[0] <= got[1]).all()


@pytest.mark.parametrize("fmt", ALL, **by_name)
def test_scalars_have_a_grid_of_their_own(fmt, backend):
    """A 0-d tensor is one element, for blocks one block; 2/3 rounds up to 0.67 or so in every format."""
    if getattr(fmt, "block_dim", 0) == 1:
        pytest.skip("a 0-d tensor has no dim 1")
    x = torch.tensor(2 / 3)
    runs(backend, "quantize", x, fmt)
    value = Fraction(float(x))
    if isinstance(fmt, BlockFloatingPoint):
        grid = [oracle.block_rounded([value], fmt, x.dtype, None)[0][0]]
    elif isinstance(fmt, MicroscalingFloat):
        grid = oracle.run_grid(oracle.scale_exponent(value, fmt, x.dtype), fmt)
    else:
        grid = oracle.grid_of(fmt)
    got = quantize(x, fmt, rounding="nearest", backend=backend)
    assert got.shape == ()
    assert float(got) == oracle.nearest(value, grid)
    assert same_bits(decode(encode(x, fmt, backend=backend)), got)
    assert quantize_variance_corrected(x, 0.0, fmt, key=KEY, backend=backend).shape == ()


def ends_of_blocks(x, fmt):
    """Smallest and largest value of each element's block; ``x`` lies on its grid, or rounds to nothing larger."""
    exponents = parse_format(fmt).blocks.expand(encode(x, fmt, backend="reference").exponents.long(), x.shape)
    micro = isinstance(fmt, MicroscalingFloat)
    top = fmt.element.max * power_of_two(exponents) if micro else fmt.code_max * power_of_two(exponents + 2 - fmt.bits)
    return -top, top


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ALL, **by_name)
def test_nan_stays_and_infinities_saturate(fmt, dtype, backend):
    """NaN is kept where it is and nowhere else; an infinity takes the end of the range of its block."""
    x = torch.tensor([[1.0, math.nan, -math.inf, 0.25], [math.inf, 0.5, 0.0, -1.0], [0.0, 0.0, 2.0, 1.0]], dtype=dtype)
    runs(backend, "quantize", x, fmt)
    finite = torch.where(x.isfinite(), x, torch.zeros_like(x))
    low, high = (fmt.min, fmt.max) if not isinstance(fmt, BlockFormat) else ends_of_blocks(finite, fmt)
    for rounding in ("nearest", "stochastic"):
        got = quantize(x, fmt, rounding=rounding, key=KEY, backend=backend)
        plain = quantize(finite, fmt, rounding=rounding, key=KEY, backend=backend)
        ends = torch.where(x > 0, torch.as_tensor(high), torch.as_tensor(low)).to(dtype).expand(x.shape)
        expected = torch.where(x.isinf(), ends, plain)
        assert same_bits(got, torch.where(x.isnan(), x, expected))


def test_a_block_with_nothing_finite_takes_the_largest_exponent(backend):
    x = torch.tensor([[math.inf, -math.inf], [math.nan, math.nan], [math.nan, math.inf], [0.0, math.inf]])
    got = quantize(x, "bfp8", rounding="nearest", backend=runs(backend, "quantize", x, "bfp8"))
    top = 127 * 2.0**121
    assert torch.equal(got[0], torch.tensor([top, -top]))
    assert got[1].isnan().all()
    assert got[2, 0].isnan()
    assert got[2, 1] == top
    assert torch.equal(got[3], torch.tensor([0.0, top]))


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8", "bfp8-tensor", "mxint8", "e2m1", "mxfp6e3m2", "mxfp4"])
def test_encode_refuses_nan_where_no_code_says_it(fmt, backend):
    x = torch.tensor([[1.0, math.nan], [math.nan, 0.0]])
    runs(backend, "encode", x, fmt)
    with pytest.raises(ValueError, match=r"2 of 4 elements are NaN"):
        encode(x, fmt, backend=backend)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e4m3-ieee", "bf16"])
def test_floating_point_codes_keep_nan(fmt, backend):
    x = torch.tensor([1.0, math.nan, math.inf, -2.0])
    runs(backend, "encode", x, fmt)
    top = parse_format(fmt).max
    got = decode(encode(x, fmt, backend=backend), backend=backend)
    assert same_bits(got, torch.tensor([1.0, math.nan, top, -2.0]))


@pytest.mark.parametrize("fmt", [f for f in FIXED + FLOATS if f.bits == 8], **by_name)
def test_every_code_decodes_to_its_value(fmt, backend):
    """All 256 codes (fixed: the integer; float: the bit pattern), and encoding gives the code back."""
    grid = oracle.grid_of(fmt)
    x = torch.tensor([float(v) for v in grid], dtype=torch.float64)
    runs(backend, "encode", x, fmt)
    encoded = encode(x, fmt, backend=backend)
    assert len(encoded.codes.unique()) == len(grid)
    assert torch.equal(decode(encoded, torch.float64, backend=backend), x)
    if isinstance(fmt, FixedPoint):
        assert encoded.codes.tolist() == [int(v / oracle.power(-fmt.fraction_length)) for v in grid]


def test_sixteen_and_twenty_four_bits(backend, generator):
    x = torch.randn(64, 5, generator=generator)
    for fmt, dtype in (
        ("fixed16.12", torch.int16),
        ("bfp12", torch.int16),
        ("fixed24.20", torch.int32),
        ("bfp24", torch.int32),
    ):
        runs(backend, "encode", x, fmt)
        encoded = encode(x, fmt, backend=backend)
        assert encoded.codes.dtype == dtype
        rounded = quantize(x, fmt, rounding="nearest", backend=backend)
        assert torch.equal(decode(encoded, backend=backend), rounded)
        assert (rounded - x).abs().max() < 2e-2


def test_powers_and_exponents_are_exact_from_the_bits():
    """Every exponent of float64's normal range; exponents of subnormals and of neighbours of powers of two."""
    exponents = torch.arange(-1022, 1024)
    powers = power_of_two(exponents)
    assert powers.tolist() == [math.ldexp(1.0, e) for e in exponents.tolist()]
    assert torch.equal(exponent_of(powers), exponents)
    below = torch.nextafter(powers, torch.zeros_like(powers))[1:]
    assert torch.equal(exponent_of(below), exponents[1:] - 1)
    assert exponent_of(torch.tensor([5e-324, 2e-323], dtype=torch.float64)).tolist() == [-1074, -1072]


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: quantize(x, "bfp8"), TypeError, "needs `key=DrawKey"),
        (lambda x: quantize(x, "bfp8", rounding="up", key=KEY), ValueError, "'nearest' or 'stochastic', got 'up'"),
        (lambda x: quantize(x.long(), "bfp8", rounding="nearest"), TypeError, "got torch.int64"),
        (lambda x: quantize(x.to_sparse(), "bfp8", rounding="nearest"), TypeError, "to_dense"),
        (lambda x: quantize(x.half(), "bfp24", rounding="nearest"), ValueError, "wider than torch.float16"),
        (lambda x: quantize(x, "bfp8", rounding="nearest", backend="gpu"), ValueError, "`backend` must be"),
        (lambda x: quantize(x, "bfp8-dim5", rounding="nearest"), ValueError, "`block_dim` 5 does not exist"),
        (lambda x: quantize_variance_corrected(x, -0.1, "bfp8", key=KEY), ValueError, "`variance` must be >= 0"),
        (lambda x: quantize_variance_corrected(x, math.nan, "bfp8", key=KEY), ValueError, "`variance` must be >= 0"),
        (lambda x: quantize_variance_corrected(x, x * math.nan, "bfp8", key=KEY), ValueError, "`variance` must"),
        (lambda x: quantize_variance_corrected(x, 0.1, "bfp8", key=None), TypeError, "needs `key=DrawKey"),
        (lambda x: decode(encode(x, "bf16"), torch.float16), ValueError, "wider than torch.float16"),
        (lambda x: encode(x, "bfp8", rounding="stochastic"), TypeError, "needs `key=DrawKey"),
    ],
)
def test_refusals_name_argument_rule_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))
