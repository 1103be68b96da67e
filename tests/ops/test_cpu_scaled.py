"""The fused step of floats that share scales against the composition that defines it: same draws, so the same weights.

Plain rounding is equal bit for bit. Q^vc has float32 thresholds in the kernel and float64 ones in the reference: single
elements land on the neighbouring grid point (see ``test_cpu_backend.py``, whose share is allowed here).
"""

from __future__ import annotations

import pytest
import torch
from test_cpu_backend import ALLOWED, assert_same, special_values

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import StepSpec, cpu, quantize, reference
from lightning_lpsgld.ops.cpu_library import LEVELS, load
from lightning_lpsgld.random import DrawKey, Role, stream_id
from lightning_lpsgld.samplers.updates import langevin_step_, views_

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

FORMATS = ["mxfp8e4m3", "mxfp8e4m3-fit", "mxfp8e5m2", "mxfp6e3m2-fit", "mxfp6e2m3", "mxfp4", "mxfp4e2m1-fit"]
#: Whole runs, short ones at the ends of rows, rows shorter than a run, single elements, nothing.
SHAPES = [
    (16, 3, 3, 3),
    (20, 33, 3, 3),
    (40, 33),
    (3, 70),
    (200, 7),
    (90, 15),
    (7,),
    (300,),
    (10, 512),
    (5, 1),
    (),
    (0,),
]
KEYS = [DrawKey(seed=3, step=4, offset=i) for i in range(len(SHAPES))]
TOTAL = sum(torch.Size(shape).numel() for shape in SHAPES)
BEST = cpu.instruction_set()


def tensors(seed: int, channels_last: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES]
    return [t.to(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t for t in made]


def compared(spec: StepSpec, params: list[torch.Tensor], grads: list[torch.Tensor]) -> int:
    """How many weights differ after a step of both; counts and, where there are sums, sums are compared as well."""
    sums = [p + 0.01 for p in params] if spec.accumulation == "full" else None
    composed, totals = [p.clone() for p in params], None if sums is None else [a.clone() for a in sums]
    indices = range(5, 5 + len(params))
    keys = KEYS[: len(params)]
    counts = cpu.langevin_steps_(params, grads, sums, spec, keys, indices)
    rows = zip(composed, grads, totals or [None] * len(params), keys, indices)
    assert counts.tolist() == [int(langevin_step_(p, g, a, spec, k, j, "reference")) for p, g, a, k, j in rows]
    if sums is not None and totals is not None:
        reach = 8 * 2.0**-24 * (6.77 * spec.noise_variance**0.5 + 1.0)
        assert all(bool(((a - b).abs() <= reach).all()) for a, b in zip(sums, totals))
    return sum(int((p != q).sum()) for p, q in zip(params, composed))


GRADIENTS = [None, "mxfp8e5m2b16", "mxfp8e4m3-fit", "bfp8", "bfp8-tensor", "fixed8.6", "e4m3"]
#: Two gradient formats for every weight format, and two weight formats for every gradient format.
PAIRS = [(w, GRADIENTS[(i + j) % len(GRADIENTS)]) for i, w in enumerate(FORMATS) for j in (1, 3)]


@pytest.mark.parametrize(("weight", "gradient"), PAIRS)
def test_step_agrees_with_the_composition(weight, gradient):
    fmt, slope = parse_format(weight), None if gradient is None else parse_format(gradient)
    cases = [(0.0, 0.0, False), (1e-8, 1e-2, True), (1e-4, 0.0, False), (1e-2, 1e-2, False)]
    for number, mode in enumerate(("naive", "vc", "full")):
        for variance, weight_decay, channels_last in cases[number % 2 :]:
            spec = StepSpec(0.1, weight_decay, variance, fmt, slope, mode)
            grads = [g.flip(0) if g.ndim else g for g in tensors(1, channels_last)]
            differing = compared(spec, tensors(0, channels_last), grads)
            assert differing <= (0 if variance == 0 and mode != "vc" else 2 * ALLOWED * TOTAL)


@pytest.mark.parametrize("weight", [None, "bfp8", "bfp8-tensor", "fixed8.6", "e4m3", "bfp8b3"])
@pytest.mark.parametrize("gradient", ["mxfp8e4m3", "mxfp4e2m1-fit"])
def test_gradients_that_share_scales_under_other_weights(weight, gradient):
    fmt = None if weight is None else parse_format(weight)
    mode = "float" if fmt is None else "vc"
    spec = StepSpec(0.1, 1e-2, 0.0 if fmt is None else 1e-6, fmt, parse_format(gradient), mode)
    chosen = [i for i, s in enumerate(SHAPES) if weight != "bfp8b3" or (len(s) > 1 and s[-1] % 3 == 0)]
    params, grads = ([tensors(seed)[i] for i in chosen] for seed in (0, 1))
    assert compared(spec, params, grads) <= (0 if fmt is None else ALLOWED * TOTAL)


@pytest.mark.parametrize("fmt", FORMATS)
def test_special_values(fmt):
    """Scales at both ends of float32, zeros, infinities, NaN and any bit pattern, in whole and in short runs."""
    number, key = parse_format(fmt), KEYS[3]
    for x in special_values(990).values():
        for shape in [(990,), (10, 99), (330, 3)]:
            for mode in ("naive", "vc"):
                spec = StepSpec(0.1, 0.0, 0.0 if mode == "naive" else 1e-4, number, number, mode)
                ours, theirs, still = x.reshape(shape).clone(), x.reshape(shape).clone(), torch.zeros(shape)
                count = cpu.langevin_steps_([ours], [still], None, spec, [key], [1])
                assert int(count) == int(langevin_step_(theirs, still, None, spec, key, 1, "reference"))
                if mode == "naive":
                    assert_same(ours, theirs)
                assert torch.equal(ours.isnan(), theirs.isnan())
                assert int(((ours != theirs) & ~theirs.isnan()).sum()) <= 1


@pytest.mark.parametrize(
    ("fmt", "mean", "sigma"), [("mxfp8e4m3", 0.95, 0.05), ("mxfp4e2m1-fit", 6.0, 0.45), ("mxfp6e2m3-fit", 7.5, 0.12)]
)
def test_noise_that_passes_the_top_of_a_run(fmt, mean, sigma):
    """It finds the hole of e4m3 and takes runs to the next scale, where what is next to zero is rounded again."""
    number, variance = parse_format(fmt), sigma**2
    x = 0.2 * torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5:21:3] = mean
    spec, key = StepSpec(0.1, 0.0, variance, number, None, "vc"), DrawKey(seed=1, offset=6)
    ours, theirs = x.clone(), x.clone()
    cpu.langevin_steps_([ours], [torch.zeros_like(x)], None, spec, [key], [0])
    langevin_step_(theirs, torch.zeros_like(x), None, spec, key, 0, "reference")
    assert int((ours != theirs).sum()) <= ALLOWED * x.numel()
    plan, own = reference.variance_plan(x, variance, number), key.at(stream=stream_id(Role.WEIGHT, 0))
    values = reference.vc_codes(plan, number, own) * reference.power_of_two(plan.gap_exponents)
    if number.has_hole:
        reached = number.in_hole(values, x.dtype)[0]
    else:
        reached = values.abs().amax(1) > number.element.max * reference.power_of_two(plan.exponents[:, 0])
    assert 40 < int(reached.sum()) < 1960
    assert torch.equal(quantize(ours, number, rounding="nearest"), ours)


@pytest.mark.parametrize("gradient", ["mxfp8e4m3", "bfp8-tensor"])
@pytest.mark.parametrize("fmt", ["mxfp8e4m3", "mxfp4e2m1-fit"])
def test_step_does_not_depend_on_threads_or_instruction_set(fmt, gradient):
    spec = StepSpec(0.1, 1e-3, 1e-6, parse_format(fmt), parse_format(gradient), "vc")
    results, before = [], torch.get_num_threads()
    levels = [level for level in LEVELS.values() if level <= LEVELS.get(BEST, 0)]
    for level, threads in [(-1, 1), *((level, 1) for level in levels), (-1, 3)]:
        load()[0].lpsgld_level(level)
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(1)
        params = [torch.randn(s, generator=generator) for s in [(3, 70_001), (500, 300), (4000, 3), (1000,)]]
        cpu.langevin_steps_(params, [p * 0.3 for p in params], None, spec, [DrawKey(seed=1)] * 4, [0, 1, 2, 3])
        results.append(params)
    load()[0].lpsgld_level(-1)
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_are_seen_of_their_sums(fmt):
    number, sums = parse_format(fmt), tensors(0)
    params = [torch.zeros_like(a) for a in sums]
    counts = views_(params, sums, number, KEYS, range(len(sums)), "cpu")
    for i, (param, total, key) in enumerate(zip(params, sums, KEYS)):
        expected = quantize(total, number, key=key.at(stream=stream_id(Role.VIEW, i)), backend="reference")
        assert torch.equal(param, expected)
        low, high = number.value_limits(total)
        assert int(counts[i]) == int(((total < low) | (total > high)).sum())
