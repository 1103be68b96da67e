"""Chains on the device against the same chains on the CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_lpsgld.samplers import HALP, SGHMC, SGLD, PreconditionedSGLD

STEPS = 12
SAMPLERS = {
    "SGLD vc bfp8": partial(SGLD, weight_format="bfp8", gradient_format="bfp8"),
    "SGLD vc fixed": partial(SGLD, weight_format="fixed8.6", gradient_format="fixed8.6"),
    "SGLD naive": partial(SGLD, weight_format="bfp8", gradient_format="bfp8", variance_corrected=False),
    "SGLD full": partial(SGLD, weight_format="bfp8", gradient_format="bfp8", accumulator="full"),
    "SGLD clamp": partial(SGLD, weight_format="bfp8-clamp", gradient_format="bfp8-clamp"),
    "SGLD e4m3": partial(SGLD, weight_format="e4m3", gradient_format="bfp8"),
    "SGLD mx": partial(SGLD, weight_format="mxfp8e4m3", gradient_format="mxfp8e4m3"),
    "SGLD lattice": partial(SGLD, weight_format="fixed8.6", variant="lattice"),
    "SGHMC low": partial(SGHMC, weight_format="bfp8", gradient_format="bfp8", velocity_format="bfp8", friction=2.0),
    "SGHMC full": partial(SGHMC, weight_format="bfp8", gradient_format="bfp8", accumulator="full", friction=2.0),
    "preconditioned": partial(PreconditionedSGLD, weight_format="bfp8", gradient_format="bfp8"),
}


def start() -> list[Tensor]:
    shapes = [(16, 64), (27,), (8, 3, 3, 3), (1,), (12, 130)]
    generator = torch.Generator().manual_seed(2)
    return [0.3 * torch.randn(shape, generator=generator) for shape in shapes]


def chain(make: partial, device: str, backend: str, temperature: float) -> list[Tensor]:
    """Weights after some steps in a quadratic bowl: its gradient is one multiplication, the same on every device."""
    params = [nn.Parameter(p.to(device)) for p in start()]
    sampler = make(
        params, 2.0**-4, num_data=1000, temperature=temperature, weight_decay=2.0**-10, seed=3, backend=backend
    )
    if hasattr(sampler, "round_parameters_"):
        sampler.round_parameters_()
    for _ in range(STEPS):
        for p in params:
            p.grad = 0.75 * p.detach()
        sampler.step()
    return [p.detach().cpu() for p in params]


@pytest.mark.parametrize("name", SAMPLERS)
def test_reference_chains_are_the_cpus_bit_for_bit_without_noise(name: str, device: str) -> None:
    """At temperature 0 nothing but exact draws enters."""
    if name == "SGLD lattice":
        pytest.skip("its walk needs noise")
    make = SAMPLERS[name]
    ours, theirs = (chain(make, where, "reference", 0.0) for where in (device, "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("name", SAMPLERS)
def test_chains_with_noise_are_the_cpus_but_for_thresholds(name: str, device: str) -> None:
    """The fused kernels of both: a draw may fall between two roundings of a threshold, and a weight then differs."""
    make = SAMPLERS[name]
    theirs = torch.cat([p.flatten() for p in chain(make, "cpu", "auto", 1.0)])
    for backend in ("reference", "auto"):
        ours = torch.cat([p.flatten() for p in chain(make, device, backend, 1.0)])
        assert ours.isfinite().all()
        close = (ours - theirs).abs() <= 1e-4 if "full" in name or "preconditioned" in name else ours == theirs
        assert (~close).float().mean() <= 0.02, int((~close).sum())


def test_halp_on_the_device_is_the_cpus(device: str) -> None:
    def run(where: str, backend: str) -> Tensor:
        weight = nn.Parameter(torch.zeros(8, device=where))
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).to(where)
        targets = (inputs @ torch.linspace(-1, 1, 8, device=where)).detach()

        def loss(rows: slice) -> Tensor:
            weight.grad = None
            value = 0.5 * (inputs[rows] @ weight - targets[rows]).square().mean()
            value.backward()
            return value.detach()

        sampler = HALP([weight], 0.2, mu=1.0, num_data=64, temperature=0.0, seed=1, backend=backend)
        for _ in range(10):
            sampler.recentre(lambda: loss(slice(None)))
            for i in range(0, 64, 16):
                sampler.step(lambda i=i: loss(slice(i, i + 16)))
        return weight.detach().cpu()

    assert (run(device, "auto") - run("cpu", "auto")).abs().max() < 1e-2
    assert (run(device, "auto") - torch.linspace(-1, 1, 8)).abs().max() < 0.1


@pytest.mark.parametrize("fmt", ["bfp8", "fixed8.6"])
def test_a_step_does_not_wait_for_the_device(fmt: str, cuda: str) -> None:
    """After the first steps: nothing is read back, so the host runs ahead."""
    params = [nn.Parameter(p.to(cuda)) for p in start()]
    sampler = SGLD(params, 2.0**-4, num_data=1000, weight_format=fmt, gradient_format=fmt, seed=1)
    sampler.round_parameters_()
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    for _ in range(3):
        sampler.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            sampler.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    from lightning_lpsgld.formats import parse_format
    from lightning_lpsgld.ops import StepSpec
    from lightning_lpsgld.random import DrawKey
    from lightning_lpsgld.samplers.updates import langevin_steps_

    number = parse_format(fmt)
    spec = StepSpec(0.1, 0.0, 1e-6, number, number, "vc")
    weights, grads = [p.detach() for p in params], [p.grad for p in params]
    for step in range(4):
        if step == 2:
            allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        langevin_steps_(weights, grads, None, spec, [DrawKey(1, step=step)] * len(weights), range(len(weights)))
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
