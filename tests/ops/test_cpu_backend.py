"""Coupled tests of the fused CPU kernels: same draws, so equal to the reference, bit for bit where that is promised."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lpsgld.formats import BlockFloatingPoint, FloatingPoint, check_dtype, parse_format
from lightning_lpsgld.ops import StepSpec, cpu, encode, quantize, reference
from lightning_lpsgld.ops.cpu_layout import native_key, pointer
from lightning_lpsgld.ops.cpu_library import LEVELS, load, team_of_torch
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.random import DrawKey, normals, words
from lightning_lpsgld.samplers.updates import langevin_step_, langevin_steps_

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"needs the built CPU kernels: {cpu.unavailable()}"
)

FORMATS = [
    *("fixed8.6", "fixed8.8", "fixed8.6s", "fixed24.0", "fixed2.-100", "fixed4.120"),
    *("bfp8", "bfp8-tensor", "bfp4", "bfp2", "bfp24", "bfp8e3", "bfp5b4", "mxint8"),
    *("e4m3", "e5m2", "e2m1", "e3m2", "bf16", "fp16", "tf32", "fp32"),
]
SHAPES = [(0,), (3, 0), (), (1,), (3,), (7,), (33,), (1000,), (5, 7), (9, 1), (3, 1001), (40, 32), (4, 3, 3, 3)]
BEST = cpu.instruction_set()


@pytest.fixture(params=[name for name in LEVELS if LEVELS[name] <= LEVELS.get(BEST, 0)])
def instruction_set(request):
    """Every instruction set of this machine."""
    library = load()[0]
    library.lpsgld_level(LEVELS[request.param])
    yield request.param
    library.lpsgld_level(-1)


def on_every_instruction_set(compute: Callable[[], torch.Tensor]) -> Iterator[torch.Tensor]:
    """What ``compute`` gives on each instruction set of this machine."""
    library = load()[0]
    for name in LEVELS:
        if LEVELS[name] <= LEVELS.get(BEST, 0):
            library.lpsgld_level(LEVELS[name])
            try:
                yield compute()
            finally:
                library.lpsgld_level(-1)


@pytest.fixture(params=[(1, "torch"), (2, "torch"), (2, "own")], ids=["one", "two of torch", "two own"])
def threads(request):
    """Number of threads; more than one are torch's, as where it has OpenMP, or those of the kernels."""
    count, whose = request.param
    library, before = load()[0], torch.get_num_threads()
    torch.set_num_threads(count)
    library.lpsgld_team(team_of_torch() if whose == "torch" else None)
    yield count
    library.lpsgld_team(team_of_torch())
    torch.set_num_threads(before)


def special_values(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """float32 values: ordinary, every exponent, any bit pattern (NaN, infinities, subnormals), zeros, ties."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    exponents = torch.randint(-150, 128, (count,), generator=generator)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).int().view(torch.float32)
    halves = torch.randint(-300, 300, (count,), generator=generator) / 128
    rare = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38])
    return {
        "normal": normal,
        "scales": torch.ldexp(normal, exponents),
        "bits": bits,
        "subnormal": normal * 1e-39 * (torch.arange(count) % 3 > 0),
        "zeros": torch.zeros(count),
        "ties": halves,
        "rare": rare.repeat(count // len(rare) + 1)[:count],
        "infinite": torch.full((count,), -torch.inf),
    }


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal bit for bit, all NaN taken as one."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    missing = theirs.isnan()
    assert torch.equal(ours.isnan(), missing)
    ours, theirs = ours.masked_fill(missing, 0), theirs.masked_fill(missing, 0)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours.signbit(), theirs.signbit())


def fits(fmt, dtype: torch.dtype) -> bool:
    try:
        check_dtype(fmt, dtype)
    except ValueError:
        return False
    return True


# ---- Draws ----


def native_draws(key: DrawKey, count: int, *, normal: bool) -> torch.Tensor:
    out = torch.empty(count, dtype=torch.float32 if normal else torch.int32)
    pointers = (pointer(out), None) if normal else (None, pointer(out))
    load()[0].lpsgld_draws(ctypes.byref(native_key(key)), *pointers, ctypes.c_int64(count))
    return out


KEYS = [
    DrawKey(seed=0),
    DrawKey(seed=2**64 - 1, step=2**32 - 1, stream=2**31 - 1, offset=5),
    DrawKey(seed=2**63 + 12345, step=7, stream=1 << 24, offset=2**34 - 6),  # the index passes 2**32 blocks
    DrawKey(seed=3, offset=2**61 + 3),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 511, 513, 3000])
def test_words_are_those_of_the_counter(key, count, instruction_set):
    assert torch.equal(native_draws(key, count, normal=False).long() & 0xFFFFFFFF, words((count,), key))


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_normals_are_within_float32_rounding(key, instruction_set):
    """Invariant: |z32 - z64| <= 6 * 2**-24 * radius of the pair.

    Half an ulp (2**-24) each: logarithm twice halved by the root, root, angle, polynomial of the cosine, its last two
    operations, the product.
    """
    count = 200_000
    even = key.at(offset=key.offset - key.offset % 2)
    exact, ours = normals((count,), even), native_draws(even, count, normal=True).double()
    radius = exact.unflatten(0, (-1, 2)).norm(dim=1).repeat_interleave(2)
    assert bool(((ours - exact).abs() <= 6 * 2.0**-24 * radius).all())


# ---- quantize, encode, decode ----


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_quantize_equals_the_reference(fmt, rounding):
    number = parse_format(fmt)
    for shape in SHAPES:
        for i, x in enumerate(special_values(max(1, torch.Size(shape).numel())).values()):
            x = x[: torch.Size(shape).numel()].reshape(shape)
            if cpu.refusal("quantize", x, (number,)) is not None:
                continue
            key = DrawKey(seed=11, step=2, stream=3, offset=37 * i)
            theirs = reference.quantize(x, number, rounding, key)
            for ours in on_every_instruction_set(partial(cpu.quantize, x, number, rounding, key)):
                assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_quantize_of_half_precision_equals_the_reference(fmt, dtype):
    number = parse_format(fmt)
    if not fits(number, dtype):
        with pytest.raises(ValueError, match="wider than"):
            quantize(torch.zeros(2, dtype=dtype), number, rounding="nearest")
        return
    for x in special_values(999).values():
        for shape in [(999,), (9, 111)]:
            x = x.to(dtype).reshape(shape)
            if cpu.refusal("quantize", x, (number,)) is not None:
                continue
            for rounding in ("nearest", "stochastic"):
                key = DrawKey(seed=1, offset=3)
                theirs = reference.quantize(x, number, rounding, key)
                for ours in on_every_instruction_set(partial(cpu.quantize, x, number, rounding, key)):
                    assert_same(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70),
    fmt=st.sampled_from(FORMATS),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    seed=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**62 - 1),
    columns=st.integers(1, 5),
)
def test_quantize_equals_the_reference_on_any_bits(bits, fmt, rounding, seed, offset, columns):
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = x[: len(bits) // columns * columns].reshape(-1, columns)
    number = parse_format(fmt)
    if x.numel() == 0 or cpu.refusal("quantize", x, (number,)) is not None:
        return
    key = DrawKey(seed=seed, step=seed % 2**32, stream=seed % 2**31, offset=offset)
    assert_same(cpu.quantize(x, number, rounding, key), reference.quantize(x, number, rounding, key))


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "fixed8.6", "e4m3"])
@pytest.mark.parametrize("shape", [(300_001,), (2, 150_000), (30, 5000)])
def test_long_blocks_are_shared_by_threads(fmt, shape, threads):
    x = special_values(torch.Size(shape).numel())["scales"].reshape(shape)
    key = DrawKey(seed=5, offset=1)
    number = parse_format(fmt)
    assert_same(cpu.quantize(x, number, "stochastic", key), reference.quantize(x, number, "stochastic", key))
    x[..., 77] = torch.inf
    assert_same(cpu.quantize(x, number, "nearest", None), reference.quantize(x, number, "nearest", None))


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "fixed8.6", "e4m3", "bfp8b4"])
@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (3, 64, 9, 9), (2, 300, 4, 5), (2, 3, 1, 2), (2, 5, 3, 4, 2)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_channels_last_draws_by_logical_index(fmt, shape, rounding, threads):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = special_values(torch.Size(shape).numel())["normal"].reshape(shape).contiguous(memory_format=last)
    number, key = parse_format(fmt), DrawKey(seed=5, offset=6)
    if cpu.refusal("quantize", x, (number,)) is not None:
        pytest.skip("the kernels leave ragged runs to the reference")
    ours = cpu.quantize(x, number, rounding, key)
    assert_same(ours, reference.quantize(x.contiguous(), number, rounding, key))
    if "b4" not in fmt:
        assert ours.is_contiguous(memory_format=last)


def test_channels_last_draws_on_both_sides_of_a_high_word():
    """Words are made in batches whose first rounds are shared where the counter's high word is the same."""
    x = special_values(2 * 64 * 81)["normal"].reshape(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)
    number = parse_format("fixed8.6")
    for before in (3, 700, 5300):  # elements before the block with index 2**32
        key = DrawKey(seed=5, offset=2**34 - before)
        ours = cpu.quantize(x, number, "stochastic", key)
        assert_same(ours, reference.quantize(x.contiguous(), number, "stochastic", key))


@pytest.mark.parametrize("fmt", ["bfp8", "fixed8.6", "e4m3"])
def test_other_strides_are_copied(fmt):
    base = special_values(6 * 8 * 10)["normal"].reshape(6, 8, 10)
    number, key = parse_format(fmt), DrawKey(seed=5)
    for x in (base.transpose(0, 2), base[:, ::2], base[0].expand(3, 8, 10), base.permute(1, 2, 0)):
        assert_same(cpu.quantize(x, number, "stochastic", key), reference.quantize(x, number, "stochastic", key))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_codes_equal_the_reference_and_decode_to_the_quantized(fmt, rounding):
    number = parse_format(fmt)
    for shape in SHAPES:
        for kind, x in special_values(max(1, torch.Size(shape).numel())).items():
            x = x[: torch.Size(shape).numel()].reshape(shape)
            if not (isinstance(number, FloatingPoint) and number.specials != "none"):
                x = x.nan_to_num(0.5, torch.inf, -torch.inf)
            if cpu.refusal("encode", x, (number,)) is not None:
                continue
            ours, theirs = (m.encode(x, number, rounding, DrawKey(seed=2, offset=9)) for m in (cpu, reference))
            assert torch.equal(ours.codes, theirs.codes), (kind, shape)
            assert ours.codes.dtype == theirs.codes.dtype
            assert (ours.exponents is None) == (theirs.exponents is None)
            if ours.exponents is not None:
                assert ours.exponents.dtype == torch.int8
                assert torch.equal(ours.exponents, theirs.exponents)
            if cpu.refusal("decode", ours.codes, (number,)) is None:
                assert_same(
                    cpu.decode(ours, torch.float32), cpu.quantize(x, number, rounding, DrawKey(seed=2, offset=9))
                )


@pytest.mark.parametrize(
    "fmt", ["fixed8.6", "fixed12.3", "fixed20.5", "bfp8", "bfp8-tensor", "bfp12", "bfp20", "e4m3", "bf16"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_decode_equals_the_reference_on_any_codes(fmt, dtype):
    number = parse_format(fmt)
    generator = torch.Generator().manual_seed(0)
    like = reference.encode(torch.zeros(30, 41), number, "nearest", None)
    limits = torch.iinfo(like.codes.dtype)
    codes = torch.randint(limits.min, limits.max, (30, 41), generator=generator).to(like.codes.dtype)
    exponents = None
    if like.exponents is not None:
        exponents = torch.randint(-128, 128, like.exponents.shape, generator=generator).to(torch.int8)
    encoded = Encoded(codes, exponents, number)
    assert_same(cpu.decode(encoded, dtype), reference.decode(encoded, dtype))


def test_decode_into_writes_in_place_and_tells_autograd():
    x = torch.randn(20, 3, 5, 5)
    encoded = encode(x, "bfp8")
    expected = reference.decode(encoded, torch.float32)
    for out in (
        torch.empty_like(x),
        torch.empty_like(x, dtype=torch.bfloat16),
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.nn.Parameter(torch.empty_like(x)),
    ):
        version, place = out._version, out.data_ptr()
        assert cpu.decode_into(encoded, out) is out
        assert out.data_ptr() == place
        assert out._version > version
        assert_same(out.detach(), expected.to(out.dtype))
    with pytest.raises(ValueError, match="shape"):
        cpu.decode_into(encoded, torch.empty(3))


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8", "e2m1"])
def test_encode_refuses_nan_where_no_code_is_one(fmt):
    x = torch.tensor([[0.5, torch.nan], [1.0, torch.nan]])
    with pytest.raises(ValueError, match="2 of 4 elements are NaN"):
        cpu.encode(x, parse_format(fmt), "nearest", None)


# ---- The variance-corrected quantizer and the step: float32 against float64 ----
#
# A code differs where a uniform falls between the float32 and the float64 threshold. With noise of s gaps the error of
# a threshold is at most about (6 * 6.77 s + 4) 2**-24 (normals, then the arithmetic near 1): for s <= 10 a share below
# 2.5e-5 of the elements, and always by one gap. The tests allow 1e-4 and count over 10^5 elements.
ALLOWED = 1e-4


@pytest.mark.parametrize(
    "fmt", ["fixed8.6", "fixed8.8", "bfp8", "bfp8-tensor", "bfp4", "e4m3", "e5m2", "bf16", "mxint8"]
)
@pytest.mark.parametrize("variance", [0.0, 1e-8, 1e-5, 1e-2])
def test_variance_corrected_agrees_with_the_reference(fmt, variance):
    number, key, shape = parse_format(fmt), DrawKey(seed=1, step=2, stream=3, offset=5), (100, 1024)
    x = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = cpu.quantize_variance_corrected(x, variance, number, key)
    theirs = reference.quantize_variance_corrected(x, variance, number, key)
    plan = reference.variance_plan(x, variance, number)
    gaps = (ours.double() - theirs.double()).abs() / reference.power_of_two(plan.gap_exponents)
    assert int((gaps > 0).sum()) <= ALLOWED * x.numel()
    assert float(gaps.max()) <= (2 if isinstance(number, FloatingPoint) else 1)  # beyond a binade codes are 2 apart


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8", "bfp8-tensor", "e4m3", "e5m2"])
@pytest.mark.parametrize("variance", [0.0, 1e-4])
def test_variance_corrected_of_special_values(fmt, variance):
    number, key = parse_format(fmt), DrawKey(seed=1)
    for x in special_values(990).values():
        for shape in [(990,), (10, 99)]:
            ours, theirs = (
                m.quantize_variance_corrected(x.reshape(shape), variance, number, key) for m in (cpu, reference)
            )
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert int(((ours != theirs) & ~theirs.isnan()).sum()) <= 1


def test_variance_per_element_takes_the_reference():
    x, variance = torch.randn(50), torch.rand(50) * 1e-3
    number, key = parse_format("fixed8.6"), DrawKey(seed=1)
    ours, theirs = (m.quantize_variance_corrected(x, variance, number, key) for m in (cpu, reference))
    assert torch.equal(ours, theirs)


STEP_SHAPES = [(16, 3, 3, 3), (20, 33, 3, 3), (7,), (300,), (10, 512), (5, 1), (), (0,)]


def step_tensors(channels_last: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) * 0.1 for shape in STEP_SHAPES]
    if channels_last:
        tensors = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
    return tensors


CASES = [
    ("float", None),
    *((mode, fmt) for mode in ("full", "naive", "vc") for fmt in ("fixed8.6", "bfp8", "bfp8-tensor", "e4m3")),
]


@pytest.mark.parametrize("gradient_format", [None, "fixed8.6", "bfp8", "bfp8-tensor", "e4m3"])
@pytest.mark.parametrize(("mode", "weight_format"), CASES)
def test_step_agrees_with_the_composition(mode, weight_format, gradient_format):
    weight, gradient = (None if f is None else parse_format(f) for f in (weight_format, gradient_format))
    for variance, weight_decay, channels_last in [(0.0, 0.0, False), (1e-8, 0.0, False), (1e-4, 1e-2, True)]:
        spec = StepSpec(0.1, weight_decay, variance, weight, gradient, mode)
        keys = [DrawKey(seed=3, step=4, offset=i) for i in range(len(STEP_SHAPES))]
        params, grads = step_tensors(channels_last), [g.flip(0) if g.ndim else g for g in step_tensors(channels_last)]
        composed = [p.clone() for p in params]
        sums = [p + 0.01 for p in params] if mode == "full" else None
        sums_composed = None if sums is None else [a.clone() for a in sums]
        indices = range(5, 5 + len(params))
        counts = cpu.langevin_steps_(params, grads, sums, spec, keys, indices)
        expected = [
            langevin_step_(p, g, a, spec, k, j, "reference")
            for p, g, a, k, j in zip(composed, grads, sums_composed or [None] * len(params), keys, indices)
        ]
        assert counts.tolist() == [int(c) for c in expected]
        total = sum(p.numel() for p in params)
        differing = sum(int((p != q).sum()) for p, q in zip(params, composed))
        if mode == "float" or sums is not None:  # not rounded: the noise is float32 instead of float64
            ours, theirs = (params, composed) if sums is None else (sums, sums_composed)
            reach = 8 * 2.0**-24 * (6.77 * variance**0.5 + 1.0)
            assert all(bool(((a - b).abs() <= reach).all()) for a, b in zip(ours, theirs) if a.numel())
        if variance == 0 and mode != "vc":
            assert differing == 0
        if mode != "float":
            assert differing <= ALLOWED * total


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "fixed8.6"])
def test_step_does_not_depend_on_threads_or_instruction_set(fmt, instruction_set):
    number = parse_format(fmt)
    spec = StepSpec(0.1, 1e-3, 1e-6, number, parse_format("bfp8"), "vc")
    results = []
    for level, count in [(LEVELS[instruction_set], 1), (LEVELS[instruction_set], 3), (-1, 2)]:
        load()[0].lpsgld_level(level)
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        generator = torch.Generator().manual_seed(1)
        params = [torch.randn(s, generator=generator) for s in [(3, 70_001), (500, 301), (1000,)]]
        cpu.langevin_steps_(params, [p * 0.3 for p in params], None, spec, [DrawKey(seed=1)] * 3, [0, 1, 2])
        torch.set_num_threads(before)
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_step_of_strided_parameters_goes_through_a_copy():
    spec = StepSpec(0.1, 0.0, 1e-6, parse_format("bfp8"), parse_format("bfp8"), "vc")
    storage, grad = torch.randn(40, 30), torch.randn(30, 20)
    param, plain = storage[::2].t(), storage[::2].t().contiguous()
    untouched = storage[1::2].clone()
    version = param._version
    for target in (param, plain):
        cpu.langevin_steps_([target], [grad], None, spec, [DrawKey(seed=1)], [0])
    assert torch.equal(param, plain)
    assert torch.equal(storage[1::2], untouched)
    assert param._version > version


def negated(x: torch.Tensor) -> torch.Tensor:
    """The values of ``x``, held as the lazy negation of their negatives."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


def test_a_lazy_negative_bit_is_not_overlooked():
    """Such tensors are the imaginary parts of conjugates; their memory holds the other sign."""
    x, key, fmt = torch.randn(40, 30), DrawKey(seed=1), parse_format("bfp8")
    assert torch.equal(cpu.quantize(negated(x), fmt, "stochastic", key), cpu.quantize(x, fmt, "stochastic", key))
    assert torch.equal(cpu.encode(negated(x), fmt, "nearest", None).codes, cpu.encode(x, fmt, "nearest", None).codes)
    spec = StepSpec(0.1, 1e-2, 1e-6, fmt, fmt, "vc")
    results = []
    for bits in ((False, False), (True, False), (False, True), (True, True)):
        param, grad = (negated(t) if lazy else t.clone() for t, lazy in zip((x, x.flip(0).contiguous()), bits))
        cpu.langevin_steps_([param], [grad], None, spec, [key], [0])
        results.append(param.resolve_neg())
    assert not torch.equal(results[0], x)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("shift", [1, 3, 7])
@pytest.mark.parametrize("fmt", ["bfp8", "fixed8.6", "e4m3"])
def test_memory_that_begins_anywhere_is_read_and_written(fmt, shift, instruction_set):
    """Views that begin ``shift`` elements into their memory: aligned for no vector; run under the sanitizers, too."""
    load()[0].lpsgld_level(LEVELS[instruction_set])
    number, key, shape = parse_format(fmt), DrawKey(seed=1), (19, 33)

    def moved(x):
        storage = torch.zeros(x.numel() + shift, dtype=x.dtype)
        view = storage[shift:].view(x.shape)
        assert view.data_ptr() % 16
        return view.copy_(x)

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(
            cpu.quantize(moved(x), number, "stochastic", key), cpu.quantize(x, number, "stochastic", key)
        )
    x, grad = torch.randn(shape), torch.randn(shape)
    encoded = cpu.encode(x, number, "nearest", None)
    exponents = None if encoded.exponents is None else moved(encoded.exponents)
    unaligned = Encoded(moved(encoded.codes), exponents, number)
    assert torch.equal(cpu.decode(unaligned, torch.float32), cpu.decode(encoded, torch.float32))
    spec = StepSpec(0.1, 1e-2, 1e-6, number, number, "vc")
    params = [x.clone(), moved(x)]
    for param, g in zip(params, (grad, moved(grad))):
        cpu.langevin_steps_([param], [g], None, spec, [key], [0])
    assert torch.equal(*params)


def test_dispatch_takes_the_fused_step_and_steps_are_seen_by_autograd():
    param = torch.nn.Parameter(torch.randn(30, 20))
    grad, spec = torch.randn(30, 20), StepSpec(0.1, 0.0, 1e-6, parse_format("bfp8"), None, "vc")
    other, version = param.detach().clone(), param._version
    with torch.no_grad():
        langevin_steps_([param], [grad], None, spec, [DrawKey(seed=1)], [4])
    cpu.langevin_steps_([other], [grad], None, spec, [DrawKey(seed=1)], [4])
    assert torch.equal(param, other)
    assert param._version > version


def test_on_grid_weights_stay_without_noise_and_gradient():
    for fmt in ("fixed8.6", "bfp8", "bfp8-tensor", "e4m3"):
        number = parse_format(fmt)
        param = reference.quantize(torch.randn(50, 40), number, "nearest", None)
        before = param.clone()
        spec = StepSpec(0.1, 0.0, 0.0, number, number, "vc")
        cpu.langevin_steps_([param], [torch.zeros(50, 40)], None, spec, [DrawKey(seed=1)], [0])
        assert torch.equal(param, before)


# ---- Where the backend ends ----


def test_refusals_name_the_reason():
    x, bfp = torch.zeros(4, 6), BlockFloatingPoint(8)
    assert cpu.refusal("quantize", x, (bfp,)) is None
    assert "float64" in cpu.refusal("quantize", x.double(), (bfp,))
    assert "float32" in cpu.refusal("langevin_steps_", x.bfloat16(), (bfp,))
    assert "runs of equal length" in cpu.refusal("quantize", x, (BlockFloatingPoint(8, block_dim=1),))
    assert "runs of equal length" in cpu.refusal("quantize", x, (BlockFloatingPoint(8, block_size=4),))
    assert "meta" in cpu.refusal("quantize", x.to("meta"), (bfp,))
    assert "16 bits" in cpu.refusal("decode", x.int(), (FloatingPoint(8, 10),))


def test_environment_variable_turns_the_backend_off(monkeypatch):
    monkeypatch.setenv("LIGHTNING_LPSGLD_CPU", "0")
    assert "LIGHTNING_LPSGLD_CPU=0" in load.__wrapped__()[1]
    monkeypatch.setenv("LIGHTNING_LPSGLD_CPU", "sse")
    assert "must be" in load.__wrapped__()[1]


def test_environment_variable_keeps_the_kernels_off_torchs_threads():
    """The threads of a process are counted: torch's two do the work, or a third is started."""
    code = (
        "import os, torch; from lightning_lpsgld.ops import quantize; torch.set_num_threads(2)\n"
        "x = torch.randn(1000, 1000); x.exp(); before = len(os.listdir('/proc/self/task'))\n"
        "quantize(x, 'bfp8', rounding='nearest'); print(len(os.listdir('/proc/self/task')) - before)"
    )
    for whose, more in (("own", "1"), ("", "0")):
        environment = os.environ | {"LIGHTNING_LPSGLD_THREADS": whose}
        assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == more


def test_environment_variable_names_whose_threads(monkeypatch):
    monkeypatch.setenv("LIGHTNING_LPSGLD_THREADS", "mine")
    assert "must be torch or own" in load.__wrapped__()[1]


def test_environment_variable_limits_the_instruction_set(monkeypatch):
    monkeypatch.setenv("LIGHTNING_LPSGLD_CPU", "baseline")
    try:
        assert load.__wrapped__()[1] is None
        assert cpu.instruction_set() == "baseline"
    finally:
        load()[0].lpsgld_level(-1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_gets_threads_of_its_own(threads):
    """Invariant: a DataLoader worker forked after the pool has started computes the same and does not hang."""
    x = torch.arange(400_000.0).reshape(100, 4000)
    expected = cpu.quantize(x, parse_format("bfp8"), "stochastic", DrawKey(seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            ours = cpu.quantize(x, parse_format("bfp8"), "stochastic", DrawKey(seed=1))
            torch.set_num_threads(1)  # torch's own threads (OpenMP) do not survive a fork
            status = 0 if torch.equal(ours, expected) else 3
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert os.waitstatus_to_exitcode(done[1]) == 0


def test_calls_from_many_threads_do_not_disturb_each_other(threads):
    x = torch.randn(100, 3000)
    fmt = parse_format("bfp8")
    expected = [cpu.quantize(x, fmt, "stochastic", DrawKey(seed=i)) for i in range(6)]
    wrong = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(cpu.quantize(x, fmt, "stochastic", DrawKey(seed=i)), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_flush_to_zero_of_the_caller_changes_nothing():
    x = special_values(1000)["subnormal"].reshape(10, 100)
    expected = reference.quantize(x, parse_format("bfp8"), "nearest", None)
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a CPU with flush-to-zero")
    try:
        ours = cpu.quantize(x, parse_format("bfp8"), "nearest", None)
    finally:
        torch.set_flush_denormal(False)
    assert_same(ours, expected)
