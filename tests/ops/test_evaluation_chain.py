"""Cast, batch norm, ReLU, cast in one pass: the bits of one operation after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import Encoded, cpu, decode
from lightning_lpsgld.ops.cpu_library import LEVELS, load
from lightning_lpsgld.ops.evaluation import Chain, Norm, composed, evaluate, refusal, rounded

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no kernels here")
SHAPES = [(3, 5, 4, 4), (2, 64, 7, 5), (1, 3, 40, 140), (2, 17), (3, 4, 9), (4, 1, 1, 1)]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def level(request):
    """Each instruction set that the machine has."""
    library, wanted = load()[0], list(LEVELS).index(request.param)
    if library.lpsgld_level(wanted) != wanted:
        library.lpsgld_level(-1)
        pytest.skip("not on this machine")
    yield request.param
    library.lpsgld_level(-1)


def norm_of(channels: int, affine: bool, seed: int) -> Norm:
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, channels, generator=g) if affine else (None, None)
    mean, var = torch.randn(channels, generator=g), torch.rand(channels, generator=g) + 0.1
    return Norm(mean, var, weight, bias, 1e-5)


def assert_same(got: Tensor | Encoded, expected: Tensor | Encoded) -> None:
    if isinstance(expected, Encoded):
        assert isinstance(got, Encoded)
        assert got.format == expected.format
        assert (got.exponents is None) == (expected.exponents is None)
        assert got.exponents is None or torch.equal(got.exponents, expected.exponents)
        assert got.codes.stride() == expected.codes.stride()
        assert torch.equal(got.codes, expected.codes)
    else:
        assert got.stride() == expected.stride()
        assert torch.equal(got, expected)  # of the sign of zero torch's ReLU says nothing


def chains(x: Tensor, fmt: str):
    for affine in (None, False, True):
        norm = None if affine is None else norm_of(x.shape[1], affine, 1)
        for first in (None, parse_format(fmt)):
            for relu in (False, True):
                yield Chain(x, first, norm, relu)


@pytest.mark.parametrize("fmt", ["bfp8", "bfp6", "bfp8-clamp", "bfp8e3", "fixed8.4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_pass_has_the_bits_of_the_composition(shape, fmt, level):
    """Where torch's batch norm is a fused multiply-add, as on every processor with AVX2."""
    fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT" and level != "baseline"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    x[0] *= 1e-3
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    number = parse_format(fmt)
    for dense in (x, x.contiguous()):
        for chain in chains(dense, fmt):
            assert refusal(dense, chain.first, number) is None
            if chain.norm is None or fused:
                for last in (None, number):
                    assert_same(evaluate(chain, last), composed(chain, last))
                assert_same(rounded(chain, number), decode(composed(chain, number)))
            else:
                got, expected = evaluate(chain, None), composed(chain, None)
                largest = (chain.raw.abs().amax() * 10).clamp(min=1)
                assert (got - expected).abs().max() <= torch.finfo(torch.float32).eps * largest


def test_a_tie_of_the_last_rounding_and_the_top_of_a_block():
    x = torch.tensor([[127.0, 126.5, 125.5, -126.5], [127.4, 0.5, -0.5, 1.5], [127.5, 0.0, -0.0, -127.9]])
    number = parse_format("bfp8")
    for chain in (Chain(x), Chain(x, relu=True), Chain(x, number), Chain(-x, number, relu=True)):
        assert_same(evaluate(chain, number), composed(chain, number))
        assert_same(rounded(chain, number), decode(composed(chain, number)))
    assert evaluate(Chain(x), number).exponents.tolist() == [6, 6, 7]


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39, 1e-30, 1e30, 3e38])
def test_numbers_at_the_ends_are_those_of_the_composition(scale):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * scale
    number = parse_format("bfp8")
    for chain in chains(x, "bfp8"):
        assert_same(evaluate(chain, number), composed(chain, number))
        assert_same(evaluate(chain, None), composed(chain, None))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_left_to_the_composition(value):
    number, x = parse_format("bfp8"), torch.randn(2, 3, 4, 4)
    x[1, 2, 3, 3] = value
    broken = Norm(torch.zeros(3), torch.tensor([1.0, value, 1.0]), None, None, 1e-5)
    for chain in (Chain(x, number, relu=True), Chain(torch.randn(2, 3, 4, 4), None, broken, relu=True)):
        plain = composed(chain, None)
        assert torch.equal(evaluate(chain, None).nan_to_num(7.0), plain.nan_to_num(7.0))
        if plain.isnan().any():
            with pytest.raises(ValueError, match="NaN"):
                evaluate(chain, number)
            assert rounded(chain, number).isnan().sum() == plain.isnan().sum()
        else:
            assert_same(evaluate(chain, number), composed(chain, number))


def test_what_has_no_kernel_is_composed(monkeypatch):
    x, number = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), parse_format("bfp8")
    assert "float32" in refusal(x.double(), number)
    assert "row-major" in refusal(x[:, ::2], number)
    assert "no codes of at most 8 bits" in refusal(x, parse_format("bfp16"))
    assert "no codes of at most 8 bits" in refusal(x, parse_format("e4m3"))
    assert "not whole samples" in refusal(x, parse_format("bfp8-tensor"))
    for chain in (Chain(x[:, ::2], number, relu=True), Chain(x.double(), number)):
        assert torch.equal(evaluate(chain, number).codes, composed(chain, number).codes)
    monkeypatch.setattr("lightning_lpsgld.ops.evaluation._missing", lambda: "an older library")
    assert refusal(x, number) == "an older library"
    assert torch.equal(evaluate(Chain(x, number), number).codes, composed(Chain(x, number), number).codes)


def test_chains_are_not_compared_by_their_tensors():
    """From Python 3.13 on dataclasses compare field by field, and two tensors have no equality that is one bool."""
    x, number = torch.ones(2, 3), parse_format("bfp8")
    assert Chain(x) != Chain(x)
    assert [chain.bare for chain in (Chain(x), Chain(x, relu=True), Chain(x, number))] == [True, False, False]
