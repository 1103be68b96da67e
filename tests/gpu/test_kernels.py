"""Every kernel on the device against the reference on the CPU, bit for bit where that is promised."""

from __future__ import annotations

import pytest
import torch
from helpers.triton_checks import FORMATS, cases, check_gap, key_for, same_bits, samples
from torch import Tensor, nn

from lightning_lpsgld.formats import check_dtype, parse_format
from lightning_lpsgld.ops import (
    CodedTensor,
    decode,
    dispatch,
    encode,
    quantize,
    quantize_variance_corrected,
    reference,
    self_check,
)
from lightning_lpsgld.random import DrawKey, normals, uniforms, words

MICRO = ["mxfp8e4m3", "mxfp8e5m2", "mxfp6e3m2", "mxfp6e2m3", "mxfp4e2m1", "mxfp8e4m3-fit", "mxfp4e2m1-fit"]
CLAMPED = ["bfp8-clamp", "bfp8-tensor-clamp", "bfp4-clamp", "mxint8", "mxint8-clamp"]
EVERY = [*FORMATS, *CLAMPED, *MICRO]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = DrawKey(2**63 + 5, step=2**31 + 1, stream=6, offset=2**33 + 4)
CASES = {name: (check, arguments) for name, check, arguments in cases()}


def taken(text: str, op: str, x: Tensor, backend: str) -> bool:
    """Whether the format fits the dtype and the backend takes the call; skips where it does not fit at all."""
    fmt = parse_format(text)
    try:
        check_dtype(fmt, x.dtype)
    except ValueError as error:
        pytest.skip(str(error))
    return dispatch._refusal(backend, op, x, [fmt]) is None


@pytest.mark.parametrize("name", CASES)
def test_the_interpreters_checks_hold_on_the_device(name: str, kernels: str) -> None:
    if kernels != "triton":
        pytest.skip("these are the Triton kernels'")
    check, arguments = CASES[name]
    check(*arguments)


def test_draws_are_the_cpus(device: str) -> None:
    """Words and uniforms bit for bit; normals within the last bits of the device's float64 logarithm and cosine."""
    for shape in ((1,), (7, 13), (3, 4096)):
        assert torch.equal(words(shape, KEY, device=device).cpu(), words(shape, KEY))
        assert torch.equal(uniforms(shape, KEY, device=device).cpu(), uniforms(shape, KEY))
        assert (normals(shape, KEY, device=device).cpu() - normals(shape, KEY)).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_rounding_is_the_cpus_bit_for_bit(text: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Zeros of both signs, infinities, NaN and subnormals among the values; scalars, empty, odd and aligned shapes."""
    for number, shape in enumerate([(), (0, 64), (64,), (6, 64), (2, 3, 4, 32), (3, 96)]):
        there = samples(shape, dtype, number)
        here = there.cpu()
        taken(text, "quantize", there, "reference")
        for rounding in ("stochastic", "nearest"):
            ours = quantize(there, text, rounding=rounding, key=KEY, backend=backend)
            theirs = quantize(here, text, rounding=rounding, key=KEY, backend="reference")
            assert ours.device.type == there.device.type
            assert same_bits(ours.cpu(), theirs), (shape, rounding)


@pytest.mark.parametrize("text", EVERY)
def test_codes_are_the_cpus(text: str, device: str) -> None:
    for shape in ((64,), (6, 64), (2, 3, 4, 32)):
        there = samples(shape, torch.float32, 3).nan_to_num(nan=1.0, posinf=8.0, neginf=-8.0)
        ours = encode(there, text, rounding="stochastic", key=KEY)
        theirs = encode(there.cpu(), text, rounding="stochastic", key=KEY, backend="reference")
        assert torch.equal(ours.codes.cpu(), theirs.codes)
        assert (ours.exponents is None) == (theirs.exponents is None)
        assert ours.exponents is None or torch.equal(ours.exponents.cpu(), theirs.exponents)
        for dtype in (torch.float32, torch.bfloat16):
            try:
                check_dtype(parse_format(text), dtype)
            except ValueError:
                continue
            assert same_bits(decode(ours, dtype).cpu(), decode(theirs, dtype, backend="reference"))


@pytest.mark.parametrize("text", ["bfp3", "bfp4", "bfp6", "fixed5.3", "e2m1", "mxfp4e2m1", "mxfp6e3m2"])
def test_packed_weights_are_the_cpus(text: str, device: str) -> None:
    """Bytes, values, views, rows that share bytes, and a row that is set."""
    for shape in ((37, 5), (6, 64), (4, 3, 3, 2)):
        values = quantize(samples(shape, torch.float32, 3).nan_to_num(1.0, 8.0, -8.0).cpu(), text, rounding="nearest")
        here, there = CodedTensor.of(values, text), CodedTensor.of(values.to(device), text)
        assert torch.equal(there.stored().codes.cpu(), here.stored().codes)
        assert same_bits(there.decoded().cpu(), values)
        assert same_bits((there[1:3].transpose(0, 1) + 0.0).cpu(), values[1:3].transpose(0, 1))
        step = there.stored().stride_of_rows
        if step < shape[0]:
            there.cell.set(torch.zeros(step, *shape[1:], device=device), 0, step)
            assert same_bits(there.decoded().cpu(), torch.cat([torch.zeros_like(values[:step]), values[step:]]))
        if len(shape) == 2:
            places = torch.tensor([[3, 1], [5, 3]])
            assert same_bits(nn.functional.embedding(places.to(device), there).cpu(), there.decoded().cpu()[places])


@pytest.mark.parametrize("text", ["bfp8", "bfp4", "bfp8b4", "bfp8-tensor", "bfp8-clamp", "bfp2"])
def test_the_top_of_a_block_is_the_cpus(text: str, device: str) -> None:
    """All positions of the largest between the last code and the next power of two, both signs."""
    code, rows = parse_format(text).code_max, torch.arange(256)
    top = (code + (rows % 128 + 0.5) / 128) / (code + 1) * torch.where(rows < 128, 1.0, -1.0)
    x = torch.stack([top, 0.3 * top, torch.linspace(-0.7, 0.7, 256), torch.full((256,), 0.0371)], dim=1)
    for step in range(4):
        for part in (x, x[:, :3].contiguous(), x[step::16].repeat(1, 2100)):  # in registers, unaligned, longer rows
            ours = quantize(part.to(device), text, key=KEY.at(step=step))
            assert same_bits(ours.cpu(), quantize(part, text, key=KEY.at(step=step), backend="reference"))


@pytest.mark.parametrize("text", ["bfp8", "bfp8-tensor", "bfp8b4", "fixed8.6", "e4m3", "mxfp8e4m3"])
def test_memory_layouts(text: str, device: str) -> None:
    x = samples((2, 8, 6, 32), torch.float32, 4).cpu()
    expected = quantize(x, text, key=KEY, backend="reference")
    there = x.to(device)
    wide = torch.zeros(2, 8, 6, 64, device=device)
    wide[..., ::2] = there
    views = [there.to(memory_format=torch.channels_last), wide[..., ::2], there.flip(3).flip(3)]
    views.append(there.movedim(1, -1).contiguous().movedim(-1, 1))
    views.append(torch.empty(x.numel() + 1, device=device)[1:].view_as(x))
    views[-1].copy_(there)  # an address that takes no vector moves
    for view in views:
        assert same_bits(quantize(view, text, key=KEY).cpu(), expected)


@pytest.mark.parametrize("text", ["bfp8", "bfp8-tensor", "fixed8.6", "e4m3", "mxfp8e4m3"])
def test_large_tensors(text: str, device: str, cuda: str) -> None:
    """Ten million elements on the device, kernels against the reference there, and the first rows against the CPU's."""
    x = torch.randn(160, 64, 32, 32, generator=torch.Generator().manual_seed(3))
    there = x.to(device)
    ours = quantize(there, text, key=KEY)
    assert same_bits(ours, quantize(there, text, key=KEY, backend="reference"))
    if text != "bfp8-tensor":
        assert same_bits(ours[:1].cpu(), quantize(x[:1], text, key=KEY, backend="reference"))


@pytest.mark.parametrize("variance", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("text", ["fixed8.6", "bfp8", "bfp8-tensor", "bfp8b4", "bfp8-clamp", "e4m3", "mxfp8e4m3"])
def test_variance_corrected_is_the_cpus_but_for_thresholds(text: str, variance: float, device: str) -> None:
    fmt = parse_format(text)
    there = samples((8, 96), torch.float32, 5, special=False)
    ours = quantize_variance_corrected(there, variance, fmt, key=KEY).cpu()
    theirs = quantize_variance_corrected(there.cpu(), variance, fmt, key=KEY, backend="reference")
    gap = reference.power_of_two(reference.variance_plan(there.cpu(), variance, fmt).gap_exponents)
    check_gap(ours, theirs, (2 * gap).expand(ours.shape))


def test_values_beyond_four_billion_bytes(cuda: str) -> None:
    """Addresses need 64 bits: 1.1 billion bfloat16 elements, of which the last rows are compared."""
    free, _ = torch.cuda.mem_get_info()
    if free < 12e9:
        pytest.skip("needs 12 GB of device memory")
    x = torch.zeros(1_100_000, 1024, dtype=torch.bfloat16, device=cuda)
    last = torch.randn(8, 1024, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    x[-8:] = last.to(cuda)
    ours = quantize(x, "bfp8", key=DrawKey(1))[-8:].cpu()
    offset = (len(x) - 8) * 1024
    assert same_bits(ours, quantize(last, "bfp8", key=DrawKey(1, offset=offset), backend="reference"))


def test_auto_takes_the_fused_kernels_and_none_failed_its_first_use(device: str, kernels: str) -> None:
    if device == "cpu" and kernels == "triton":
        pytest.skip("on a CPU 'auto' does not ask the interpreter")
    assert key_for(()).seed  # the keys of the checks have high words
    for text in ("bfp8", "fixed8.6", "e4m3", "bfp8-clamp"):
        x = samples((4, 64), torch.float32, 1, special=False)
        assert dispatch.choose("auto", "quantize", x, parse_format(text)).__name__.endswith(f".{kernels}")
        encode(x, text, rounding="nearest")
    assert self_check.failures() == []
