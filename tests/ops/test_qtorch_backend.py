"""QPyTorch as a rival and as a backend: nearest rounding agrees except at named ties, and the contract is kept.

``qtorch.quant`` compiles C++ at its first import in a process (cached on disk after the first time); without a
compiler every test here is skipped by that name.
"""

from __future__ import annotations

import math
import shutil
import warnings

import pytest
import torch
from helpers.stats import assert_means_equal, draws_for_means

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import backend_report, encode, quantize, quantize_variance_corrected
from lightning_lpsgld.ops import qtorch as qtorch_backend
from lightning_lpsgld.random import DrawKey

KEY = DrawKey(seed=0)
COUNT = 10**6


def _missing() -> str | None:
    state = backend_report()["qtorch"]
    if state != "available":
        return state
    if shutil.which("ninja") is None:
        return "ninja is not on PATH"
    if all(shutil.which(compiler) is None for compiler in ("c++", "g++", "clang++")):
        return "no C++ compiler is on PATH"
    return None


pytestmark = pytest.mark.skipif(_missing() is not None, reason=f"needs QPyTorch's compiled ops: {_missing()}")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile once; the warning that comes with it is tested on its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qtorch_backend._quant()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(77)


def both(x, fmt):
    return (quantize(x, fmt, rounding="nearest", backend=name) for name in ("reference", "qtorch"))


def is_tie(x, gap):
    return ((x.double() / gap) % 1.0) == 0.5


@pytest.mark.parametrize("fmt", ["fixed8.8", "fixed8.6", "fixed8.3", "fixed16.12", "fixed8.6s"])
def test_nearest_fixed_point_is_ours(fmt, generator):
    """A million values, ties among them: on the CPU, QPyTorch sends ties to even as we do."""
    number = parse_format(fmt)
    x = torch.randn(COUNT, generator=generator) * number.max / 2
    ties = torch.randint(number.code_min, number.code_max, (COUNT // 10,), generator=generator) + 0.5
    x = torch.cat([x, (ties * number.gap).float()])
    ours, theirs = both(x, fmt)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("fmt", "dims"), [("bfp8-clamp", 1), ("bfp8-tensor-clamp", (0, 1)), ("bfp8-dim1-clamp", 0), ("bfp4-clamp", 1)]
)
def test_nearest_block_differs_at_ties_only(fmt, dims, generator):
    """QPyTorch adds 6 * 2^E in float32 to cut bits off: ties go up, and so does what that addition rounds to a tie.

    Every difference is one gap upwards, and lies within half a unit in the last place of that sum from a tie.
    """
    spread = 2.0 ** torch.randint(-8, 8, (1000, 1), generator=generator)
    x = torch.randn(1000, COUNT // 1000, generator=generator) * spread
    x[:, ::7] = (x[:, ::7] * 64).round() / 64 + 1 / 128  # ties in the blocks of exponent 0
    ours, theirs = both(x, fmt)
    different = ours != theirs
    top = torch.frexp(x.abs().amax(dims, keepdim=True).double())[1] - 1
    gap = 2.0 ** (top + 2 - parse_format(fmt).word_length).double().expand_as(x)[different]
    from_tie = ((x[different].double() / gap) % 1.0 - 0.5).abs() * gap
    assert different.any(), "no tie was reached"
    assert (from_tie <= 2.0 ** (top - 22).double().expand_as(x)[different]).all()
    assert torch.equal((theirs - ours)[different].double(), gap)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e5m10", "e8m7"])
def test_nearest_floating_point_differs_at_ties_only(fmt, generator):
    """Normal numbers inside our range; QPyTorch sends ties away from zero."""
    number = parse_format(fmt)
    x = torch.randn(COUNT, generator=generator) * 2.0 ** torch.randint(-5, 6, (COUNT,), generator=generator)
    x = torch.cat([x, torch.linspace(-15.5, 15.5, 3969)])
    x = x[(x.abs() >= number.smallest_normal) & (x.abs() < number.max)]
    ours, theirs = both(x, fmt)
    different = ours != theirs
    assert different.any(), "no tie was reached"
    gap = 2.0 ** (torch.frexp(x[different].double())[1] - 1 - number.mantissa_bits)
    assert is_tie(x[different], gap).all()
    assert (theirs[different].abs() > ours[different].abs()).all()


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8-clamp", "e5m2"])
def test_stochastic_rounding_is_unbiased(fmt):
    """The same promise as of the other backends; draws come from QPyTorch's own generator."""
    x = torch.tensor([1.25, 0.3, -0.7, 0.011, -1.003, 1 / 64])
    draws = draws_for_means(0.02, len(x))
    if fmt == "bfp8-clamp":
        width = 2.0**-6
    else:
        width = 2.0**-6 if fmt == "fixed8.6" else 2.0 ** (torch.frexp(x.double())[1] - 3)
    rounded = quantize(x.repeat(draws, 1), fmt, key=KEY, backend="qtorch")
    assert_means_equal(rounded, x.double(), width=width, detect=0.02)


def test_symmetric_codes_of_blocks_are_theirs():
    """Both saturate +-1.9999 at code +-127, so that quantizing twice changes nothing."""
    x = torch.tensor([[1.9999, -1.9999]])
    ours, theirs = both(x, "bfp8-clamp")
    assert torch.equal(ours, theirs)
    assert ours.tolist() == [[1.984375, -1.984375]]


def test_the_shift_of_their_widest_float_is_not_ours(generator):
    """QPyTorch's nearest ``float(8, 23)`` shifts by a negative amount in C and is undefined; ours is the identity."""
    x = torch.randn(10_000, generator=generator)
    assert torch.equal(quantize(x, "fp32", rounding="nearest", backend="reference"), x)
    assert torch.equal(quantize(x, "fp32", key=KEY, backend="reference"), x)


def test_choosing_it_says_what_is_lost():
    qtorch_backend._quant.cache_clear()
    with pytest.warns(UserWarning, match="neither seeded nor resumable"):
        quantize(torch.ones(3), "fixed8.6", key=KEY, backend="qtorch")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantize(x.double(), "bfp8-clamp", key=KEY, backend="qtorch"), "float32 only, got torch.float64"),
        (lambda x: quantize(x.bfloat16(), "bfp8-clamp", key=KEY, backend="qtorch"), "float32 only, got torch.bfloat16"),
        (lambda x: quantize(x, "fixed8.0", key=KEY, backend="qtorch"), "no fixed point with F < 1"),
        (lambda x: quantize(x, "mxint8", key=KEY, backend="qtorch"), "QPyTorch's blocks are whole dims"),
        (lambda x: encode(x, "bfp8-clamp", backend="qtorch"), "QPyTorch has no encode"),
        (
            lambda x: quantize_variance_corrected(x, 0.1, "bfp8-clamp", key=KEY, backend="qtorch"),
            "QPyTorch has no quantize_v",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(2, 3))


def test_zero_blocks_layouts_and_shapes():
    x = torch.zeros(2, 3, 4, 4)
    x[1] = torch.linspace(-1, 1, 48).view(3, 4, 4)
    ours, theirs = both(x.contiguous(memory_format=torch.channels_last), "bfp8-clamp")
    assert theirs.shape == x.shape
    assert torch.equal(theirs[0], torch.zeros(3, 4, 4))
    assert math.isclose(float((ours - theirs).abs().max()), 0.0, abs_tol=2.0**-6)
