"""The fused steps of SGHMC and of the preconditioned sampler against the compositions that define them.

Draws are the same; thresholds and normals are float32 in the kernel and float64 in the reference, so that single
elements land on the neighbouring grid point (see ``test_cpu_backend.py``, whose share is allowed here).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import cpu, cpu_motion
from lightning_lpsgld.ops.cpu_library import load
from lightning_lpsgld.ops.flow import exact_flow
from lightning_lpsgld.ops.spec import PreconditionedSpec, UnderdampedSpec
from lightning_lpsgld.random import DrawKey
from lightning_lpsgld.samplers.preconditioned import preconditioned_step_
from lightning_lpsgld.samplers.underdamped import underdamped_step_

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

ALLOWED = 1e-4
SHAPES = [(16, 3, 3, 3), (20, 33, 3, 3), (7,), (300,), (10, 4512), (5, 1), (), (0,)]
KEYS = [DrawKey(seed=3, step=4, offset=i) for i in range(len(SHAPES))]
TOTAL = sum(torch.Size(shape).numel() for shape in SHAPES)


def tensors(seed: int, scale: float, channels_last: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) * scale for shape in SHAPES]
    return [t.to(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t for t in made]


def copies(made: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.clone() for t in made]


def differing(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> int:
    return sum(int((a != b).sum()) for a, b in zip(ours, theirs))


def within(ours: list[torch.Tensor], theirs: list[torch.Tensor], reach: float) -> bool:
    return all(bool(((a - b).abs() <= reach).all()) for a, b in zip(ours, theirs))


CASES = [
    ("float", None, None),
    ("full", "bfp8", None),
    ("naive", "bfp8", "bfp8"),
    ("naive", "fixed8.6", "fixed8.6"),
    ("vc", "bfp8", None),
    ("vc", "bfp8", "bfp8"),
    ("vc", "fixed8.6", "fixed8.6"),
    ("vc", "bfp8", "fixed8.6"),
    ("vc", "bfp8-tensor", "bfp8-tensor"),
    ("vc", "bfp8-clamp", "bfp8-clamp"),
    ("vc", "bfp16", "bfp16"),
    ("vc", "bfp8b3", "bfp8"),
    ("naive", "e4m3", "mxfp8e5m2"),
    ("vc", "e4m3", "e4m3"),
    ("vc", "e5m2", "bfp8"),
    ("vc", "mxfp8e4m3", "mxfp8e4m3-fit"),
    ("vc", "mxfp4e2m1-fit", "fixed8.6"),
    ("vc", "bfp8", "mxfp6e2m3"),
    ("full", "mxfp8e4m3-fit", None),
]


@pytest.mark.parametrize(("mode", "weight", "velocity"), CASES)
@pytest.mark.parametrize("temperature", [0.0, 1e-7, 1e-3])
def test_underdamped_step_agrees_with_the_composition(mode, weight, velocity, temperature):
    formats = [None if name is None else parse_format(name) for name in (weight, velocity)]
    if mode == "vc" and weight == "bfp8b3":
        shapes = [i for i, shape in enumerate(SHAPES) if len(shape) > 1 and shape[-1] % 3 == 0]
    else:
        shapes = list(range(len(SHAPES)))
    flow = exact_flow(0.1, 2.0, 1.5).heated(temperature)
    spec = UnderdampedSpec(flow, 1e-2, *formats, parse_format("bfp8"), mode, rescale=velocity != "bfp8")
    specs = [spec if i % 2 else replace(spec, gradient_format=None, weight_decay=0.0) for i in shapes]
    last = temperature == 1e-7 and weight != "bfp8b3"
    params, velocities, grads = ([made[i] for i in shapes] for made in (
        tensors(0, 0.1, last), tensors(1, 0.03, last), tensors(2, 0.2)))  # fmt: skip
    sums = [p + 0.01 for p in params] if mode == "full" else [None] * len(params)
    composed, speeds = copies(params), copies(velocities)
    totals = [None if a is None else a.clone() for a in sums]
    keys, indices = [KEYS[i] for i in shapes], [5 + i for i in shapes]
    counts, scales = cpu_motion.underdamped_steps_(params, velocities, sums, grads, specs, keys, indices)
    rows = zip(composed, speeds, totals, grads, specs, keys, indices)
    expected = [underdamped_step_(*row, "reference") for row in rows]
    assert counts.tolist() == [int(count) for count, _ in expected]
    assert [None if s is None else float(s) for s in scales] == [None if s is None else float(s) for _, s in expected]
    noise = 8 * 2.0**-24 * (6.77 * max(flow.var_x, flow.var_v) ** 0.5 + 1.0)
    if mode in ("float", "full"):
        ours, theirs = (params, composed) if mode == "float" else (sums, totals)
        assert within(ours, theirs, noise)
        assert within(velocities, speeds, noise)
    if formats[0] is not None:
        assert differing(params, composed) <= (0 if temperature == 0 and mode != "vc" else ALLOWED * TOTAL)
    if formats[1] is not None:
        assert differing(velocities, speeds) <= (0 if temperature == 0 and mode != "vc" else 2 * ALLOWED * TOTAL)
    if temperature == 0 and mode == "float":
        assert differing(params, composed) == 0 == differing(velocities, speeds)


@pytest.mark.parametrize(
    ("mode", "weight"),
    [
        ("float", None),
        ("full", "bfp8"),
        ("naive", "bfp8"),
        *(("vc", fmt) for fmt in ("bfp8", "fixed8.6", "bfp8-tensor", "bfp16")),
        *(("vc", fmt) for fmt in ("e4m3", "e2m1", "mxfp8e4m3", "mxfp8e4m3-fit", "mxfp6e3m2", "mxfp4e2m1-fit")),
        ("naive", "mxfp8e4m3"),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-5])
def test_preconditioned_step_agrees_with_the_composition(mode, weight, noise):
    fmt = None if weight is None else parse_format(weight)
    spec = PreconditionedSpec(1e-3, 1e-2, noise, 0.9, 1e-5, 0.4, fmt, parse_format("bfp8"), mode, shrinkage=0.9)
    specs = [spec if i % 2 else replace(spec, gradient_format=None, beta=1.0) for i in range(len(SHAPES))]
    params, moments, grads = tensors(0, 0.1, noise == 1e-9), [t.square() for t in tensors(1, 0.1)], tensors(2, 0.2)
    sums = [p + 0.01 for p in params] if mode == "full" else [None] * len(params)
    composed, seconds = copies(params), copies(moments)
    totals = [None if a is None else a.clone() for a in sums]
    indices = list(range(5, 5 + len(params)))
    counts = cpu_motion.preconditioned_steps_(params, moments, sums, grads, specs, KEYS, indices)
    rows = zip(composed, seconds, totals, grads, specs, KEYS, indices)
    assert counts.tolist() == [int(preconditioned_step_(*row, "reference")) for row in rows]
    assert differing(moments, seconds) == 0
    if mode in ("float", "full"):
        ours, theirs = (params, composed) if mode == "float" else (sums, totals)
        for a, b, second in zip(ours, theirs, seconds):  # torch's own root is not correctly rounded everywhere
            sigma = (noise / ((second / 0.4).sqrt() + 1e-5)).sqrt()
            assert bool(((a - b).abs() <= 16 * 2.0**-24 * (6.77 * sigma + b.abs() + 1.0)).all())
    if fmt is not None:
        assert differing(params, composed) <= ALLOWED * TOTAL


@pytest.mark.parametrize("velocity", ["bfp8", "fixed8.6"])
def test_motions_do_not_depend_on_threads_or_instruction_set(velocity):
    weight = parse_format("bfp8")
    spec = UnderdampedSpec(
        exact_flow(0.1, 2.0, 1.0).heated(1e-6), 1e-3, weight, parse_format(velocity), weight, "vc", True
    )
    results, before = [], torch.get_num_threads()
    for level, threads in [(-1, 1), (0, 1), (1, 1), (-1, 3)]:
        load()[0].lpsgld_level(level)
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(1)
        params = [torch.randn(s, generator=generator) for s in [(3, 20_001), (500, 31), (1000,)]]
        speeds = [p * 0.1 for p in params]
        cpu_motion.underdamped_steps_(
            params, speeds, [None] * 3, [p * 0.3 for p in params], [spec] * 3, [DrawKey(seed=1)] * 3, [0, 1, 2]
        )
        results.append(params + speeds)
    load()[0].lpsgld_level(-1)
    torch.set_num_threads(before)
    for other in results[1:]:
        assert differing(results[0], other) == 0


def test_blocks_of_the_velocity_pass_their_top():
    """Means just below a power of two: the noise takes blocks to the next exponent, as in the composition."""
    fmt = parse_format("bfp8")
    flow = exact_flow(0.1, 2.0, 1.0).heated(1e-5)
    spec = UnderdampedSpec(flow, 0.0, fmt, fmt, None, "vc", False)
    param = torch.full((400, 50), 0.25) + torch.linspace(0, 0.2, 20_000).reshape(400, 50)
    speed = torch.linspace(-0.3, 0.3, 20_000).reshape(400, 50)
    speed[:, 0] = 0.4975 / flow.keep  # so that the mean is 127.4 gaps, and the noise half a gap
    composed, theirs, grad = param.clone(), speed.clone(), torch.zeros(400, 50)
    cpu_motion.underdamped_steps_([param], [speed], [None], [grad], [spec], [DrawKey(seed=1)], [0])
    underdamped_step_(composed, theirs, None, grad, spec, DrawKey(seed=1), 0, "reference")
    assert differing([param], [composed]) <= 2
    assert differing([speed], [theirs]) <= 4
    raised = (speed.abs().amax(dim=1) >= 0.5).sum()
    assert 40 < raised < 360


def test_strided_weights_take_a_copy():
    fmt = parse_format("bfp8")
    spec = UnderdampedSpec(exact_flow(0.1, 2.0, 1.0).heated(1e-6), 0.0, fmt, fmt, fmt, "vc", False)
    storage, grad = torch.randn(40, 30), torch.randn(30, 20)
    param, plain = storage[::2].t(), storage[::2].t().contiguous()
    untouched, version = storage[1::2].clone(), param._version
    speeds = [torch.zeros(30, 20), torch.zeros(30, 20)]
    for target, speed in zip((param, plain), speeds):
        cpu_motion.underdamped_steps_([target], [speed], [None], [grad], [spec], [DrawKey(seed=1)], [0])
    assert torch.equal(param, plain)
    assert torch.equal(*speeds)
    assert torch.equal(storage[1::2], untouched)
    assert param._version > version
    assert cpu_motion.refusal([plain], [parse_format("e4m3"), parse_format("mxfp8e4m3")]) is None
    assert "float32" in str(cpu_motion.refusal([plain.bfloat16()], [fmt]))
