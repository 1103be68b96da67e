"""Sharded parameters over two gloo ranks: the trajectory of the unsharded run, bit for bit."""

import os

import pytest
import torch
import torch.distributed as dist
from helpers.processes import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_lpsgld.formats import BlockFloatingPoint
from lightning_lpsgld.samplers import SGHMC, SGLD

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

#: Even, uneven and empty shards; 1-D, 2-D and convolution; element counts that are no multiple of four.
SHAPES = [(8, 6), (5, 7), (1, 9), (7,), (1,), (3, 2, 3, 3)]
FORMATS = {
    "rows": "bfp8",
    "fixed": "fixed8.6",
    "whole tensor": BlockFloatingPoint(8, block_dim=None),
    "columns": BlockFloatingPoint(8, block_dim=-1),
    "runs": BlockFloatingPoint(8, block_size=4),
    "none": None,
}
VARIANTS = {
    "vc": {}, "naive": {"variance_corrected": False}, "full": {"accumulator": "full"},
    "reference": {"backend": "reference"}, "16 bits": {"accumulator": "bfp16"},
    "16 bits across shards": {"accumulator": "bfp16-tensor"},
}  # fmt: skip
PLACEMENTS = {"dim 0": Shard(0), "last dim": Shard(-1), "replicated": Replicate()}


def values(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 0.3 for shape in SHAPES]


def trajectory(fmt, variant, place, steps=3):
    """All parameters, gathered, after some steps with given gradients."""
    params = [nn.Parameter(place(x)) for x in values(0)]
    options = {"num_data": 100, "seed": 5, "weight_format": fmt, "gradient_format": fmt, "weight_decay": 0.01}
    sampler = SGLD(params, 0.1, **{**options, **variant})
    sampler.round_parameters_()
    for step in range(1, steps + 1):
        for param, grad in zip(params, values(step)):
            param.grad = place(grad)
        sampler.step()
    totals = [sampler.state[p]["accumulator"] for p in params] if "accumulator" in variant else []
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in [*(p.detach() for p in params), *totals]]


def compare():
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    different = []
    for format_name, fmt in FORMATS.items():
        for variant_name, variant in VARIANTS.items():
            if (fmt is None and variant_name != "vc") or (fmt != "bfp8" and "16" in variant_name):
                continue
            whole = trajectory(fmt, variant, lambda x: x.clone())
            for placement_name, placement in PLACEMENTS.items():

                def place(x, placement=placement):
                    return distribute_tensor(x.clone(), mesh, [placement])

                sharded = trajectory(fmt, variant, place)
                pairs = zip(SHAPES * 2, sharded, whole)
                different += [
                    (format_name, variant_name, placement_name, s) for s, a, b in pairs if not torch.equal(a, b)
                ]
    errors = [refusal(mesh, rank), nan_on_one_rank(mesh, rank)]
    dist.destroy_process_group()
    return different, errors


def nan_on_one_rank(mesh, rank):
    param = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    grad = torch.ones(4, 2)
    grad[3, 0] = float("nan")
    param.grad = distribute_tensor(grad, mesh, [Shard(0)])
    try:
        SGLD([param], 0.1, num_data=10).step()
    except FloatingPointError as error:
        return str(error)
    return "not refused"


def refusal(mesh, rank):
    param = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    try:
        SGHMC([param], 0.1, num_data=10, friction=0.1, weight_format="bfp8").step()
    except TypeError as error:
        return str(error)
    return "not refused"


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(compare)


def test_sharded_trajectories_are_those_of_one_device(ranks):
    """Coupled: same seed, same gradients; every format, accumulation and placement, weights and accumulators."""
    assert [different for different, _ in ranks] == [[], []]


def test_samplers_without_support_refuse_shards(ranks):
    assert all("SGHMC does not move sharded parameters" in errors[0] for _, errors in ranks)


def test_a_nan_on_one_rank_is_refused_on_all(ranks):
    assert all("is NaN or infinite" in errors[1] for _, errors in ranks)
