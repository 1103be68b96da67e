"""8-bit averages over two ranks: unbiased, the same bits everywhere, a quarter of the bytes."""

import os

import pytest
import torch
import torch.distributed as dist
from helpers.models import Classifier, SyntheticData, make_trainer, small_mlp
from helpers.processes import run_ranks
from helpers.stats import assert_means_equal
from torch import nn

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.distributed import GradientCompression
from lightning_lpsgld.distributed.compression import BLOCK, compress, decompress
from lightning_lpsgld.random import DrawKey

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

CELLS, COPIES = 32, 2**14


def gradient_of(rank):
    """32 cells: both signs, many scales, the largest of the block just below a power of two, and zero."""
    generator = torch.Generator().manual_seed(rank)
    cells = torch.randn(CELLS, generator=generator) * 2.0 ** -torch.randint(0, 9, (CELLS,), generator=generator)
    cells[0], cells[1], cells[2] = 3.999, -3.999, 0.0
    return cells


def averages():
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    state = GradientCompression(3, lambda: 0)
    mean = state.average(gradient_of(rank).repeat(COPIES))
    ragged = state.average(torch.arange(300.0) + rank)
    broken = state.average(torch.tensor([1.0, float("nan")]))
    dist.destroy_process_group()
    module = Classifier(nn.Sequential(nn.Linear(6, 1000), nn.ReLU(), nn.Linear(1000, 20), nn.ReLU(), nn.Linear(20, 3)))
    plugin = LowPrecisionSGLD(seed=1, compress_gradients=True, check_replicas=5)
    make_trainer(max_steps=20, max_epochs=-1, devices=2, strategy="ddp", plugins=[plugin], limit_val_batches=0).fit(
        module, datamodule=SyntheticData(n_train=640)
    )
    return {
        "mean": mean, "ragged": ragged, "broken": broken, "state": module.state_dict(),
        "bytes": (plugin.compression.bytes_sent, plugin.compression.bytes_fp32),
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(averages)


def test_the_average_is_unbiased(ranks):
    """Each copy is an independent draw. Its width: half a gap of each rank, and a gap of the mean to each side."""
    cells = [gradient_of(rank) for rank in (0, 1)]
    samples = ranks[0]["mean"].view(COPIES, CELLS)
    expected = (cells[0].double() + cells[1].double()) / 2
    width = 0.0625 / 2 + 0.0625 / 2 + 2 * 0.0625
    assert_means_equal(samples, expected, width=width, detect=0.05)


def test_all_ranks_decode_the_same_bits(ranks):
    assert torch.equal(ranks[0]["mean"], ranks[1]["mean"])
    assert torch.equal(ranks[0]["ragged"], ranks[1]["ragged"])
    assert all(torch.equal(value, ranks[1]["state"][name]) for name, value in ranks[0]["state"].items())


def test_lengths_that_fill_no_block(ranks):
    """Values up to 300: gaps of 2 (127 * 2 < 256) or 4."""
    assert ranks[0]["ragged"].shape == (300,)
    assert bool((ranks[0]["ragged"] - torch.arange(300.0) - 0.5).abs().max() <= 8)


def test_nan_is_not_lost(ranks):
    assert bool(ranks[0]["broken"].isnan().all())


def test_bytes_on_the_wire(ranks):
    sent, plain = ranks[0]["bytes"]
    assert plain == 20 * 4 * (6 * 1000 + 1000 + 20 * 1000 + 20 + 60 + 3)
    assert sent <= 0.3 * plain


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-100, 1.0, 2.0**120])
def test_codes_never_saturate_and_grid_values_are_kept(scale):
    x = torch.zeros(BLOCK)
    x[:4] = torch.tensor([1.999, -1.999, 1.0, 0.5]) * scale
    back = decompress(compress(x, DrawKey(seed=1)))
    gap = max(2.0**-5 * scale, 2.0**-120)
    assert bool(((back - x).abs() < gap).all())
    assert scale < 2.0**-110 or torch.equal(back[2:], x[2:])


def test_without_ddp_it_is_refused():
    with pytest.raises(RuntimeError, match="needs DDPStrategy"):
        make_trainer(plugins=[LowPrecisionSGLD(compress_gradients=True)]).fit(small_mlp(), datamodule=SyntheticData())
