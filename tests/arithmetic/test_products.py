"""Exact: every path of a product of codes equals the integer product, in every covered shape."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lpsgld.arithmetic import Capability, Geometry, PackedWeight, capability, choose_path, exact_product
from lightning_lpsgld.arithmetic.capability import VARIABLE

AVX2 = Capability("AVX2", onednn=True, vnni=False)
VNNI = Capability("AVX512", onednn=True, vnni=True)
NOTHING = Capability("NO AVX", onednn=False, vnni=False)

#: kind, input shape, weight shape, stride, padding, dilation, groups
SHAPES = {
    "linear": ("linear", (5, 64), (32, 64), (), (), (), 1),
    "linear, odd": ("linear", (3, 7), (5, 7), (), (), (), 1),
    "linear, sequence": ("linear", (2, 3, 16), (24, 16), (), (), (), 1),
    "conv": ("conv", (3, 16, 9, 8), (8, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided": ("conv", (2, 16, 9, 8), (24, 16, 3, 3), (2, 1), (0, 1), (1, 1), 1),
    "pointwise": ("conv", (2, 16, 5, 5), (8, 16, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "dilated": ("conv", (2, 8, 9, 9), (8, 8, 3, 3), (1, 1), (2, 2), (2, 2), 1),
    "grouped": ("conv", (2, 16, 6, 6), (8, 4, 3, 3), (1, 1), (1, 1), (1, 1), 4),
    "depthwise": ("conv", (2, 16, 6, 6), (16, 1, 3, 3), (1, 1), (1, 1), (1, 1), 16),
    "odd channels": ("conv", (2, 5, 6, 6), (7, 5, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "one dim": ("conv", (2, 8, 11), (6, 8, 3), (2,), (1,), (2,), 1),
    "deep": ("conv", (1, 512, 4, 4), (16, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def _operands(name: str, low: int, high: int, weight_high: int, seed: int = 0) -> tuple[Tensor, Tensor, Geometry]:
    kind, shape, weight_shape, *rest = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)
    w = torch.randint(-weight_high, weight_high + 1, weight_shape, generator=generator).to(torch.int8)
    return a, w, Geometry(kind, *rest)


def _definition(a: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    """The product in int64, a sum over shifted windows: no convolution of any library."""
    if geometry.kind == "linear":
        return (a.long().unsqueeze(-2) * w.long()).sum(-1)
    if a.ndim == 3:
        lifted = Geometry(
            "conv", (1, *geometry.stride), (0, *geometry.padding), (1, *geometry.dilation), geometry.groups
        )
        return _definition(a.unsqueeze(2), w.unsqueeze(2), lifted).squeeze(2)
    (sy, sx), (py, px), (dy, dx), groups = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    padded = F.pad(a.long(), (px, px, py, py)).unflatten(1, (groups, -1))  # (n, g, c, h, w)
    kernel = w.long().unflatten(0, (groups, -1))  # (g, o, c, kh, kw)
    rows = (padded.shape[-2] - dy * (w.shape[2] - 1) - 1) // sy + 1
    columns = (padded.shape[-1] - dx * (w.shape[3] - 1) - 1) // sx + 1
    total = torch.zeros(a.shape[0], groups, kernel.shape[1], rows, columns, dtype=torch.int64)
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            window = padded[
                ..., i * dy : i * dy + sy * (rows - 1) + 1 : sy, j * dx : j * dx + sx * (columns - 1) + 1 : sx
            ]
            total += torch.einsum("ngchw,goc->ngohw", window, kernel[..., i, j])
    return total.flatten(1, 2)


def _largest_pair(path: str, a: int, w: int) -> int:
    return 2 * w * {"unsigned": a, "shifted": 255, "split": a}.get(path, 0)


@pytest.mark.parametrize("path", ["unsigned", "shifted", "split", "float64"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_path_is_the_integer_product(name, path):
    """At the largest codes for which the path is exact on the weakest machine."""
    if path != "float64" and not capability().onednn:
        pytest.skip("needs oneDNN's integer kernels")
    low, high, weight_high = {
        "unsigned": (0, 127, 127), "shifted": (-127, 127, 64), "split": (-128, 127, 127), "float64": (-128, 127, 127),
    }[path]  # fmt: skip
    if path == "split":  # its halves have to be exact in float32
        high, low = (15, -15) if name == "deep" else (127, -128)
    assert _largest_pair(path, max(high, -low), weight_high if path != "split" else 127) <= 2 * 255 * 64
    a, w, geometry = _operands(name, low, high, weight_high)
    got = exact_product(a, PackedWeight(w), geometry, path)
    assert got.dtype == torch.float32
    assert torch.equal(got, _definition(a, w, geometry).float())


@pytest.mark.parametrize("machine", [AVX2, VNNI, NOTHING], ids=str)
@pytest.mark.parametrize("low", [0, -127, -128])
@pytest.mark.parametrize("name", ["conv", "deep", "linear", "depthwise"])
def test_the_chosen_path_is_exact(name, low, machine):
    """What is chosen for this machine or a weaker one is exact here."""
    here = capability()
    if (machine.vnni and not here.vnni) or (machine.onednn and not here.onednn):
        pytest.skip("needs the kernels of the machine that it plays")
    a, w, geometry = _operands(name, low, 127, 127, seed=1)
    weight = PackedWeight(w)
    path = choose_path(int(a.amin()), 127, weight, machine)
    assert torch.equal(exact_product(a, weight, geometry, path), _definition(a, w, geometry).float())


def test_paths_by_machine_and_codes():
    full, half = (
        PackedWeight(torch.full((2, 8), 127, dtype=torch.int8)),
        PackedWeight(torch.full((2, 8), 64).to(torch.int8)),
    )
    long = PackedWeight(torch.full((1, 200_000), 127, dtype=torch.int8))
    assert choose_path(0, 127, full, AVX2) == "unsigned"
    assert choose_path(-1, 127, full, AVX2) == "split"  # 2 * 255 * 127 does not fit 16 bits
    assert choose_path(-1, 127, half, AVX2) == "shifted"  # 2 * 255 * 64 does
    assert choose_path(-1, 127, full, VNNI) == "shifted"
    assert choose_path(0, 127, full, NOTHING) == "float64"
    assert choose_path(0, 127, full, VNNI, "cuda") == "float64"
    assert choose_path(0, 127, long, VNNI) == "float64"  # the sum does not fit 32 bits
    assert choose_path(-1, 127, PackedWeight(torch.full((1, 2000), 127).to(torch.int8)), AVX2) == "float64"


def test_a_shift_that_does_not_fit_would_be_seen():
    """The definition tells the exact paths from a saturating one: the reason why `shifted` is not taken there."""
    if not capability().onednn or capability().vnni:
        pytest.skip("needs integer kernels that add in 16 bits")
    a, w = torch.full((1, 64, 4, 4), 127).to(torch.int8), torch.full((8, 64, 3, 3), 127).to(torch.int8)
    geometry = Geometry("conv", (1, 1), (1, 1), (1, 1))
    got = exact_product(a, PackedWeight(w), geometry, "shifted")
    assert not torch.equal(got, _definition(a, w, geometry).float())


def test_scales_and_rounding_on_fractions():
    """The exact product with powers of two per row is rounded once: checked against fractions."""
    a = torch.full((1, 3000), 127, dtype=torch.int8)
    a[0, ::2] = 126
    w = torch.full((2, 3000), 127, dtype=torch.int8)
    w[1, ::3] = -125
    weight = PackedWeight(w, torch.tensor([2.0**-9, 2.0**3]))
    got = exact_product(a, weight, Geometry("linear"), choose_path(0, 127, weight, capability()))
    for row, scale in enumerate((Fraction(1, 512), Fraction(8))):
        exact = scale * sum(int(x) * int(y) for x, y in zip(a[0], w[row]))
        assert exact / scale > 2**24 or row == 1  # the first row's sum has more bits than a float32
        nearest = torch.tensor(float(exact), dtype=torch.float64).float()  # 26 bits: exact as a double
        assert got[0, row] == nearest


def test_the_environment_takes_away(monkeypatch):
    monkeypatch.setenv(VARIABLE, "no-onednn")
    assert not capability().onednn
    monkeypatch.setenv(VARIABLE, "no-vnni, no-onednn")
    assert (capability().onednn, capability().vnni) == (False, False)
    monkeypatch.setenv(VARIABLE, "amx")
    with pytest.raises(ValueError, match=r"LIGHTNING_LPSGLD_ARITHMETIC must be .* got 'amx'"):
        capability()
