"""Checks of the Triton kernels against the reference, as functions: run in Triton's interpreter and on a GPU.

``python -m helpers.triton_checks`` runs them all and prints one JSON line a check (``--powers``: the long chains
over powers of two instead); :data:`DEVICE` is where tensors lie.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.crossings import DRIVEN, check_crossings
from lightning_lpsgld.formats import BlockFloatingPoint, FixedPoint, check_dtype, parse_format
from lightning_lpsgld.ops import StepSpec, decode, encode, quantize, quantize_variance_corrected, reference
from lightning_lpsgld.random import DrawKey, normals

#: Where the tensors of the checks lie; tests on a device set it.
DEVICE = "cpu"
FORMATS = [
    "fixed8.6",
    "fixed16.12",
    "fixed4.-2",
    "fixed8.20s",
    "bfp8",
    "bfp8-tensor",
    "bfp4",
    "bfp16",
    "bfp8b4",
    "bfp8e4",
    "e4m3",
    "e5m2",
    "e2m1",
    "e3m2",
    "bf16",
]
VC_FORMATS = ["fixed8.6", "bfp8", "bfp8-tensor", "bfp8b4", "e4m3"]
SHAPES = [(), (0, 3), (13,), (6, 27), (2, 3, 4, 4)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = [
    (None, "bfp8", "float"), ("fixed8.6", "fixed8.6", "full"), ("fixed8.6", None, "vc"),
    ("fixed8.6", "fixed8.6", "naive"),
    ("bfp8", "bfp8", "full"), ("bfp8", "bfp8", "naive"), ("bfp8", "bfp8", "vc"), ("bfp8-tensor", "fixed8.8", "vc"),
    ("e4m3", "bfp8", "vc"),
]  # fmt: skip
#: Steps and Q^vc decide on float32 thresholds where the reference has float64: a draw may fall between the two with a
#: probability near 2**-22 an element. More than this share of differing elements is a fault, whatever their size.
DIFFERING_SHARE = 1e-3
#: Blocks whose largest element is taken over powers of two.
CROSSED = ("bfp8", "bfp8b4", "bfp8-tensor")


def samples(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, special: bool = True) -> Tensor:
    """Values over many binades; zeros of both signs, infinities, NaN, a subnormal, ties and grid points among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= torch.exp(3 * torch.randn(shape, generator=generator, dtype=torch.float64))
    flat = x.flatten()
    if special and flat.numel() > 40:
        flat[3:13] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, 0.5, -2.5 / 128, -1e-30, 3e38])
        flat[30:34] = torch.inf
    return flat.reshape(shape).to(DEVICE, dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells zeros of either sign apart and takes NaN for NaN."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.contiguous().view(integer).masked_fill(a.isnan(), 0), b.contiguous().view(integer).masked_fill(b.isnan(), 0)
    )  # fmt: skip


def accepted(shape: tuple[int, ...], text: str, dtype: torch.dtype) -> bool:
    """Whether the format fits the dtype and the backend has its blocks in that shape."""
    from lightning_lpsgld.ops import triton as backend

    fmt = parse_format(text)
    try:
        check_dtype(fmt, dtype)
    except ValueError:
        return False
    return backend.refusal("quantize", torch.empty(shape, dtype=dtype, device=DEVICE), [fmt]) is None


def key_for(shape: tuple[int, ...], seed: int = 2**63 + 12345) -> DrawKey:
    """Keys with high words everywhere; odd offsets for matrices, aligned ones beyond 2**32 quads for the rest."""
    return DrawKey(seed, step=2**31 + 3, stream=7, offset=5 if len(shape) == 2 else 2**35 + 4)


def check_quantize(text: str, dtype: str) -> None:
    """Bit for bit the reference, both roundings, every shape."""
    taken = 0
    for number, shape in enumerate(SHAPES):
        if not accepted(shape, text, DTYPES[dtype]):
            continue
        x = samples(shape, DTYPES[dtype], number)
        for rounding in ("stochastic", "nearest"):
            options: dict[str, Any] = {"rounding": rounding, "key": key_for(shape)}
            taken += x.numel()
            assert same_bits(
                quantize(x, text, backend="triton", **options), quantize(x, text, backend="reference", **options)
            ), (shape, rounding)
    assert taken > 100


def check_encode(text: str) -> None:
    """Codes and exponents of the reference; decoding gives the quantized values in every dtype."""
    fmt = parse_format(text)
    for number, shape in enumerate(SHAPES):
        if not accepted(shape, text, torch.float32):
            continue
        x = samples(shape, torch.float32, number)
        if isinstance(fmt, (FixedPoint, BlockFloatingPoint)) or fmt.specials == "none":
            x = x.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf)
        ours = encode(x, text, rounding="stochastic", key=key_for(shape), backend="triton")
        theirs = encode(x, text, rounding="stochastic", key=key_for(shape), backend="reference")
        assert torch.equal(ours.codes, theirs.codes), shape
        assert (ours.exponents is None) == (theirs.exponents is None)
        assert ours.exponents is None or torch.equal(ours.exponents, theirs.exponents), shape
        rounded = quantize(x, text, key=key_for(shape), backend="triton")
        assert same_bits(decode(ours, backend="triton"), rounded), shape


def check_encode_refuses_nan() -> None:
    """Formats without NaN say how many there were."""
    x = torch.tensor([[1.0, torch.nan], [torch.nan, 2.0]], device=DEVICE)
    for text in ("bfp8", "fixed8.6", "e2m1"):
        with pytest.raises(ValueError, match="2 of 4 elements are NaN"):
            encode(x, text, backend="triton")


def check_layouts(text: str) -> None:
    """Draws follow the logical index, so memory layout changes nothing; channels-last comes back channels-last."""
    x = samples((2, 4, 3, 5), torch.float32, 3)
    expected = quantize(x, text, key=key_for(()), backend="reference")
    channels_last = x.to(memory_format=torch.channels_last)
    wide = torch.zeros(2, 4, 3, 10, device=DEVICE)
    wide[..., ::2] = x
    for view in (channels_last, wide[..., ::2], x.movedim(1, -1).contiguous().movedim(-1, 1)):
        out = quantize(view, text, key=key_for(()), backend="triton")
        assert same_bits(out, expected)
        corrected = quantize_variance_corrected(view, 1e-4, text, key=key_for(()), backend="triton")
        assert same_bits(corrected, quantize_variance_corrected(x, 1e-4, text, key=key_for(()), backend="triton"))
    out = quantize(channels_last, text, key=key_for(()), backend="triton")
    assert out.is_contiguous(memory_format=torch.channels_last)


def check_long_rows(dtype: str) -> None:
    """Rows that no program holds: the maximum comes from a kernel of its own; aligned and not."""
    for shape, text in (((2, 8196), "bfp8"), ((8201,), "bfp8-tensor")):
        x = samples(shape, DTYPES[dtype], 1)
        key = DrawKey(5, offset=8)
        assert same_bits(quantize(x, text, key=key, backend="triton"), quantize(x, text, key=key, backend="reference"))


def check_gap(ours: Tensor, theirs: Tensor, gap: Tensor) -> None:
    """The declared tolerance: few differ, none by more than a gap."""
    both_nan = ours.isnan() & theirs.isnan()
    differing = (ours != theirs) & ~both_nan
    assert differing.sum() <= DIFFERING_SHARE * max(ours.numel(), 1), int(differing.sum())
    assert ((ours.double() - theirs.double()).abs() <= gap)[differing].all()


def check_vc(text: str, dtype: str) -> None:
    """Q^vc in both regimes and without noise, scalar variance and one per element."""
    fmt = parse_format(text)
    for number, shape in enumerate(SHAPES):
        if not accepted(shape, text, DTYPES[dtype]):
            continue
        x = samples(shape, DTYPES[dtype], number)
        spread = (torch.rand(shape, generator=torch.Generator().manual_seed(number)) * 1e-2).to(DEVICE)
        for variance in (0.0, 1e-6, 1e-2, spread):
            ours = quantize_variance_corrected(x, variance, fmt, key=key_for(shape), backend="triton")
            theirs = quantize_variance_corrected(x, variance, fmt, key=key_for(shape), backend="reference")
            gap = reference.power_of_two(reference.variance_plan(x, variance, fmt).gap_exponents).expand(shape)
            check_gap(ours, theirs, gap)


def check_normals() -> None:
    """The kernels' Box-Muller in float32 against the definition in float64, tails and both ends of ln included."""
    from lightning_lpsgld.samplers.updates import langevin_steps_

    out = torch.zeros(2**15, device=DEVICE)
    spec = StepSpec(0.0, 0.0, 1.0, None, None, "float")  # from zero, without drift: the step is the noise
    langevin_steps_([out], [torch.zeros_like(out)], None, spec, [DrawKey(5, step=3)], [9], backend="triton")
    exact = normals(out.shape, DrawKey(5, step=3, stream=9), device=DEVICE)
    # |z| < 6.77 rounds to within 2**-22; radius and angle add a few roundings of 2**-24 relative each
    assert (out - exact).abs().max() < 6.77 * 8 * 2.0**-24


def step_tensors(text: str | None, dtype: torch.dtype, mode: str, long: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:  # fmt: skip # noqa: E501
    """Weights on the grid, gradients, accumulators: odd, aligned, empty, ``long``: too long a row for a program."""
    shapes = [(), (0, 3), (13,), (16,), (6, 27), (8, 64), (1, 8200)][: 7 if long else 6]
    params, grads = [], []
    for number, shape in enumerate(shapes):
        x = samples(shape, torch.float32, number, special=False).clamp(-1.5, 1.5)
        params.append(quantize(x, text or "bfp8", rounding="nearest", backend="reference").to(dtype))
        grads.append(samples(shape, torch.float32, 100 + number, special=False).clamp(-5, 5).to(dtype))
    grads[4][2, 3], grads[4][1, 1], params[4][1, 1] = 100.0, -100.0, 1.96875  # leaves the range of fixed8.6
    accumulators = [p.float() + 1e-3 for p in params] if mode == "full" else None
    return params, grads, accumulators


def check_step(weights: str | None, gradients: str | None, mode: Any, dtype: str) -> None:
    """The fused step against the composed one: weights within the tolerance, drift exact, counts equal."""
    from lightning_lpsgld.samplers.updates import langevin_steps_

    for variance, decay in ((0.0, 0.0), (1e-8, 5e-4), (1e-3, 0.0))[0 if mode == "vc" else 1 :]:
        parsed = [fmt and parse_format(fmt) for fmt in (weights, gradients)]
        spec = StepSpec(0.1, decay, variance, parsed[0], parsed[1], mode)  # type: ignore[arg-type]
        long = variance == 1e-8 and gradients == "bfp8" and mode == "vc"
        params, grads, accumulators = step_tensors(weights, DTYPES[dtype], mode, long)
        keys = [DrawKey(2**63 + 11, step=5, offset={5: 3, 4: 8}.get(i, 0)) for i in range(len(params))]
        twins, others = [p.clone() for p in params], accumulators and [a.clone() for a in accumulators]
        ours = langevin_steps_(params, grads, accumulators, spec, keys, range(len(params)), backend="triton")
        ours = ours.clone()
        theirs = langevin_steps_(twins, grads, others, spec, keys, range(len(params)), backend="reference")
        assert torch.equal(ours, theirs)
        assert not (weights or "").startswith("fixed") or ours.sum() > 0
        for a, b in zip(accumulators or [], others or []):
            # the noise is float32 here: one rounding of the sum, and the normals' 4e-6 of a standard deviation
            assert ((a - b).abs() <= 2.0**-23 * b.abs() + 4e-6 * variance**0.5).all()
        for a, b in zip(params, twins):
            if parsed[0] is None:
                assert ((a - b).abs() <= 2.0**-23 * b.abs() + 4e-6 * variance**0.5).all()
            else:
                check_gap(a, b, 2 * b.double().abs().max() if b.numel() else torch.zeros((), device=DEVICE))
        if variance == 0:  # no normals: nothing is left to differ
            assert all(torch.equal(a, b) for a, b in zip(params, twins))


def check_top(text: str) -> None:
    """Largest elements at 64 places of the last gap, both signs: draws are the reference's, and blocks are raised."""
    from lightning_lpsgld.samplers.updates import langevin_steps_

    fmt = parse_format(text)
    top = (127 + (torch.arange(64) + 0.5) / 64) / 64 * torch.tensor([1.0, -1.0]).repeat(32)
    x = torch.stack([top, 0.3 * top, torch.linspace(-0.7, 0.7, 64), torch.full((64,), 0.0371)], dim=1).to(DEVICE)
    raised = 0
    for part in x.split(4 if text == "bfp8-tensor" else 64):
        key = key_for(part.shape)
        for variance in (0.0, 4e-5):
            ours = quantize_variance_corrected(part, variance, fmt, key=key, backend="triton")
            theirs = quantize_variance_corrected(part, variance, fmt, key=key, backend="reference")
            assert (ours != theirs).double().mean() <= DIFFERING_SHARE
            raised += int((ours.abs() >= 2.0).sum())
        plain = [quantize(part, fmt, key=key, backend=name) for name in ("triton", "reference")]
        assert same_bits(*plain)
    assert raised > 10
    spec = StepSpec(0.005 / 400, 0.0, 2 * 0.005 / 400, fmt, None, "vc")
    chain, twin = (torch.full((8, 4), 0.9921875, device=DEVICE) for _ in range(2))
    for step in range(12):  # of N(1, 1/400)
        for weights, name in ((chain, "triton"), (twin, "reference")):
            langevin_steps_([weights], [400.0 * (weights - 1)], None, spec, [DrawKey(9, step=step)], [0], backend=name)
    assert (chain != twin).double().mean() <= DIFFERING_SHARE
    assert (chain >= 1.0).any()


def check_powers_of_two(case: str, blocks: tuple[str, ...], temperatures: tuple[float, ...], steps: int) -> None:
    """Chains over the powers of two: the reference's."""
    for block in blocks:
        for temperature in temperatures:
            check_crossings(case, block, temperature, "triton", device=DEVICE, steps=steps, share=DIFFERING_SHARE)


def check_plan_is_kept() -> None:
    """While addresses stay, a step builds nothing and copies nothing; a new gradient address is followed."""
    from lightning_lpsgld.ops import triton_step
    from lightning_lpsgld.samplers.updates import langevin_steps_

    fmt = parse_format("bfp8")
    spec = StepSpec(0.1, 0.0, 1e-6, fmt, fmt, "vc")
    params = [samples((4, 8), torch.float32, 1, special=False), samples((12,), torch.float32, 2, special=False)]
    grads = [torch.ones_like(p) for p in params]
    first = langevin_steps_(params, grads, None, spec, [DrawKey(1)] * 2, [0, 1], backend="triton")
    plan = next(reversed(triton_step._plans.values()))
    addresses, version = plan.pointers, plan.table._version
    second = langevin_steps_(params, grads, None, spec, [DrawKey(1, step=1)] * 2, [0, 1], backend="triton")
    assert next(reversed(triton_step._plans.values())) is plan
    assert second.data_ptr() == first.data_ptr()
    assert plan.pointers is addresses
    assert plan.table._version == version
    twins = [p.clone() for p in params]
    moved = [2 * g for g in grads]
    langevin_steps_(params, moved, None, spec, [DrawKey(1, step=2)] * 2, [0, 1], backend="triton")
    langevin_steps_(twins, moved, None, spec, [DrawKey(1, step=2)] * 2, [0, 1], backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(params, twins))


def check_launches() -> None:
    """Sixty small tensors are two launches: the rows that move vectors, and the others."""
    from lightning_lpsgld.ops import triton_step

    fmt = parse_format("bfp8")
    spec = StepSpec(0.1, 0.0, 1e-6, fmt, fmt, "vc")
    params = [torch.zeros(4, 20 + number % 3) for number in range(60)]
    keys = [DrawKey(1)] * len(params)
    items = [triton_step._item(p, p, None, 0, spec) for p in params]
    assert len(triton_step._build(items, keys, range(60), torch.device("cpu")).launches) == 2


def check_refusals() -> None:
    """What is not taken says why."""
    with pytest.raises(RuntimeError, match="float64"):
        quantize(torch.zeros(3, dtype=torch.float64, device=DEVICE), "bfp8", rounding="nearest", backend="triton")
    with pytest.raises(RuntimeError, match="no blocks of bfp8-dim1"):
        quantize(torch.zeros(3, 4, device=DEVICE), "bfp8-dim1", rounding="nearest", backend="triton")


def cases() -> Iterator[tuple[str, Callable[..., None], tuple[Any, ...]]]:
    """Every check with its arguments."""
    for text in FORMATS:
        yield f"quantize-{text}-float32", check_quantize, (text, "float32")
        yield f"encode-{text}", check_encode, (text,)
    for text, dtype in (("bfp8", "bfloat16"), ("bfp8", "float16"), ("fixed8.6", "bfloat16"), ("e4m3", "bfloat16")):
        yield f"quantize-{text}-{dtype}", check_quantize, (text, dtype)
    for text in VC_FORMATS:
        yield f"vc-{text}-float32", check_vc, (text, "float32")
    yield "vc-bfp8-bfloat16", check_vc, ("bfp8", "bfloat16")
    for text in ("bfp8", "bfp8b5", "fixed8.6", "e4m3"):
        yield f"layouts-{text}", check_layouts, (text,)
    for dtype in ("float32", "bfloat16"):
        yield f"long-rows-{dtype}", check_long_rows, (dtype,)
    for weights, gradients, mode in STEPS:
        yield f"step-{weights}-{gradients}-{mode}-float32", check_step, (weights, gradients, mode, "float32")
    yield "step-bfp8-bfp8-vc-bfloat16", check_step, ("bfp8", "bfp8", "vc", "bfloat16")
    yield "normals", check_normals, ()
    for text in ("bfp8", "bfp8-tensor", "bfp8b4"):
        yield f"top-{text}", check_top, (text,)
    for number, case in enumerate(DRIVEN):  # every sampler once; all of it is powers_of_two()
        yield f"powers-{case}", check_powers_of_two, (case, CROSSED[number % 3 : number % 3 + 1], (1e-3,), 3)
    yield "plan", check_plan_is_kept, ()
    yield "launches", check_launches, ()
    yield "encode-nan", check_encode_refuses_nan, ()
    yield "refusals", check_refusals, ()


def powers_of_two() -> Iterator[tuple[str, Callable[..., None], tuple[Any, ...]]]:
    """Every sampler over every boundary, of elements, runs and tensors, without noise, cold and warm: minutes."""
    for case in DRIVEN:
        yield f"all-powers-{case}", check_powers_of_two, (case, CROSSED, (0.0, 1e-3, 1.0), 5)


def run_cases(chosen: Iterator[tuple[str, Callable[..., None], tuple[Any, ...]]]) -> None:
    """In the child: one JSON line per check."""
    torch.set_num_threads(1)
    for name, check, arguments in chosen:
        begun = time.perf_counter()
        try:
            check(*arguments)
            error = None
        except Exception as problem:  # every failure is a test's failure in the parent
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps({"name": name, "error": error, "seconds": round(time.perf_counter() - begun, 2)}), flush=True)


if __name__ == "__main__":
    run_cases(powers_of_two() if "--powers" in sys.argv else cases())
