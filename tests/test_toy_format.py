"""A format of a user's own, in one file of this suite, does in every room what the package's formats do.

What is parametrised over formats or samplers elsewhere has it in its list, too (``tests/bank/test_bank_roundtrip.py``,
``tests/samplers/test_sampler_protocol.py``, ``tests/ops/test_operator_library.py``); here are the ops' promises, which
other tests check against an oracle that knows the package's grids, the Trainer, and what backends answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.models import SyntheticData, make_trainer, small_mlp
from helpers.stats import assert_means_equal, draws_for_means
from helpers.toy_format import BlockLogarithmic

from lightning_lpsgld import EffectiveTemperature, EnsembleEvaluation, LowPrecisionSGLD, SampleBank, SampleCollector
from lightning_lpsgld.formats import BlockFloatingPoint, Blocks, check_dtype, parse_format
from lightning_lpsgld.ops import Encoded, decode, encode, quantize, quantize_variance_corrected
from lightning_lpsgld.ops.dispatch import choose
from lightning_lpsgld.ops.reference import variance_plan
from lightning_lpsgld.random import DrawKey, normals
from lightning_lpsgld.samplers import SGLD

FMT = BlockLogarithmic(16)
KEY = DrawKey(seed=5, step=2, stream=1)
DETECT = 0.03
#: A run of 16: the largest, powers of two, between them, either sign, zero.
X = torch.tensor([1.0, 0.7, 0.5, 0.3, -0.3, -0.75, 0.2, 1e-3, -3e-5, 0.0, 0.6, 0.9, -1.0, 0.125, 0.1, -0.01])


def values(shape, seed=0):
    x = normals(shape, DrawKey(seed)) * torch.exp(2 * normals(shape, DrawKey(seed + 1)))
    return x.float()


def grid(exponent):
    """All codes of one run's grid, in increasing order of their values."""
    codes = torch.arange(-127, 128).to(torch.int8)
    codes = torch.where(codes < 0, -128 - codes, codes)  # the sign bit, and the field
    found = FMT.unpack(codes.view(-1, 1), torch.full((255, 1), exponent))
    return found.flatten().sort().values


def test_its_name_is_known():
    assert parse_format(" LOG8B16 ") == FMT
    assert parse_format(str(FMT)) == FMT
    with pytest.raises(ValueError, match=r"wider than torch\.float16"):
        check_dtype(FMT, torch.float16)


def test_every_code_is_a_fixed_point_and_comes_back():
    """decode(encode(v)) is v for all 255 values, whatever the rounding, and the code is that of the value."""
    x = torch.full((255, 16), 2.0**-3)
    x[:, 1] = grid(-3).float()
    for rounding in ("nearest", "stochastic"):
        assert torch.equal(quantize(x, FMT, rounding=rounding, key=KEY), x)
        encoded = encode(x, FMT, rounding=rounding, key=KEY)
        assert torch.equal(decode(encoded), x)
    assert encoded.codes[:, 1].unique().numel() == 255
    assert encoded.exponents.unique().tolist() == [-3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 40), (2, 3, 4, 4), (0, 4)], ids=str)
def test_idempotent_and_decode_of_encode_is_quantize(shape, rounding, dtype):
    x = values(shape).to(dtype)
    once = quantize(x, FMT, rounding=rounding, key=KEY)
    assert torch.equal(quantize(once, FMT, rounding=rounding, key=KEY.at(step=9)), once)
    assert torch.equal(decode(encode(x, FMT, rounding=rounding, key=KEY), dtype), once)
    assert once.shape == x.shape
    assert once.dtype == dtype


def test_nearest_is_the_nearest_of_the_grid():
    x = values((64, 16), seed=3)
    exponents = FMT.exponents(x.double(), torch.float32)
    got = quantize(x, FMT, rounding="nearest")
    for row, exponent, rounded in zip(x, exponents.flatten().tolist(), got):
        points = grid(exponent)
        best = (row.double()[:, None] - points).abs().amin(1)
        assert torch.equal((row.double() - rounded).abs(), best)


def neighbours(x):
    """Largest grid value not above and smallest not below every element of the run X, E = 0."""
    points = grid(0)
    at = torch.searchsorted(points, x.double(), right=True) - 1
    lower = points[at]
    return lower, torch.where(lower == x, lower, points[(at + 1).clamp(max=254)])


def test_stochastic_rounding_is_unbiased():
    lower, upper = neighbours(X)
    draws = draws_for_means(DETECT, len(X))
    rounded = quantize(X.expand(draws, 16), FMT, key=KEY)
    assert_means_equal(rounded, X.double(), width=upper - lower, detect=DETECT)


@pytest.mark.parametrize("variance", [1e-6, 1e-3, 0.05])
def test_noise_has_the_mean_and_the_variance_that_were_asked_for(variance):
    """Q^vc: means are those asked for, variances too, or p(1-p) gap**2 where no rounding has less."""
    draws = draws_for_means(DETECT, 2 * len(X))
    rounded = quantize_variance_corrected(X.expand(draws, 16), variance, FMT, key=KEY).double()
    plan = variance_plan(X, variance, FMT)
    gap = 2.0**plan.gap_exponents
    assert not bool(plan.gaussian.any())
    assert_means_equal(rounded, X.double(), width=6 * gap, detect=DETECT)
    assert_means_equal((rounded - X) ** 2, plan.achieved * gap**2, width=9 * gap**2, detect=DETECT)
    assert torch.equal(quantize(rounded.float(), FMT, rounding="nearest").double(), rounded), "draws are on the grid"


def test_what_it_has_no_code_for_is_refused():
    with pytest.raises(ValueError, match="log8b16 have no NaN"):
        encode(torch.tensor([1.0, float("nan")]), FMT)


@pytest.mark.parametrize("backend", ["cpu", "triton", "qtorch"])
def test_no_fused_backend_takes_what_it_does_not_know(backend):
    """By their tables: not one of them mentions this format, and none computes it as something else."""
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run quantize"):
        choose(backend, "quantize", X, FMT)
    assert choose("auto", "quantize", X, FMT).__name__.endswith("reference")


def test_blocks_of_another_shape_are_never_taken_for_rows():
    """A known family in blocks that no kernel knows: refused, as its layout names no run length."""

    class Tiles(Blocks):
        """Squares of 2 x 2."""

        shared, any_order = True, False

        def compact(self, shape):
            return (*shape[:-2], shape[-2] // 2, shape[-1] // 2)

        def max(self, x, *, fill=0.0):
            return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).amax((-1, -3))

        def expand(self, values, shape):
            return values.repeat_interleave(2, -1).repeat_interleave(2, -2)

        def crosses_rows(self, ndim):
            return ndim == 2

    @dataclass(frozen=True)
    class Tiled(BlockFloatingPoint):
        @classmethod
        def from_name(cls, name):
            return None

        @property
        def blocks(self):
            return Tiles()

    x, fmt = values((16, 16)), Tiled(8)
    for backend in ("cpu", "triton"):
        with pytest.raises(RuntimeError, match="cannot run quantize"):
            choose(backend, "quantize", x, fmt)
    whole = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 1, 3).reshape(64, 4)
    wanted = quantize(whole, "bfp8", rounding="nearest", backend="reference")
    got = quantize(x, fmt, rounding="nearest")
    assert torch.equal(got.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 1, 3).reshape(64, 4), wanted)


# ------------------------------------------------------------------------------------------------- samplers and banks


@pytest.mark.parametrize("accumulator", ["low", "full", "bfp16"])
def test_a_chain_stays_on_the_grid_and_finds_the_target(accumulator):
    """512 chains of N(0.4, 0.1**2) in one tensor: their mean is the target's within a tenth of its deviation."""
    theta = torch.nn.Parameter(torch.zeros(32, 16))
    opt = SGLD([theta], lr=0.2, num_data=100, weight_format=FMT, accumulator=accumulator, seed=3)
    for _ in range(60):
        theta.grad = theta.detach() - 0.4
        opt.step()
    assert torch.equal(quantize(theta.detach(), FMT, rounding="nearest"), theta.detach())
    assert abs(float(theta.detach().mean()) - 0.4) < 0.05
    assert float(theta.detach().std()) > 0.05


def test_a_bank_stores_and_loads_it(tmp_path):
    net = small_mlp()
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(quantize(param, FMT, rounding="nearest"))
    wanted = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    bank = SampleBank(tmp_path / "bank")
    bank.add(net, step=0, formats=str(FMT))
    with torch.no_grad():
        for param in net.parameters():
            param.zero_()
    again = SampleBank.open(tmp_path / "bank")
    again.load_into(net, 0)
    assert all(torch.equal(net.state_dict()[name], wanted[name]) for name in wanted)
    entry = again[0].entries["net.0.weight"]
    assert isinstance(entry, Encoded)
    assert entry.format == FMT


# -------------------------------------------------------------------------------------------------------- the Trainer


def test_the_trainer_fits_collects_evaluates_and_reports(tmp_path):
    """Weights, gradients, activations and errors on its grid; the bank holds what was sampled, the card its name."""
    torch.manual_seed(0)
    plugin = LowPrecisionSGLD(weights=FMT, gradients=FMT, activations=FMT, errors=FMT, temperature=1e-3, seed=0)
    collector = SampleCollector(path=tmp_path / "bank", start=2, every=2)
    noise = EffectiveTemperature()
    module, data = small_mlp(), SyntheticData()
    trainer = make_trainer(max_epochs=2, plugins=[plugin], callbacks=[collector, EnsembleEvaluation(), noise])
    trainer.fit(module, data)
    (metrics,) = trainer.test(module, data, verbose=False)
    assert metrics["ensemble/accuracy"] > 0.5
    assert "log8b16" in str(plugin.card)
    for param in module.parameters():
        assert torch.equal(quantize(param.detach(), FMT, rounding="nearest"), param.detach())
    bank = SampleBank.open(tmp_path / "bank")
    assert len(bank) >= 2
    assert {str(entry.format) for entry in bank.spec.entries if entry.format} == {"log8b16"}
