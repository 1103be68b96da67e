"""Coupled: each direction of `cast` is `quantize` under its own key."""

from __future__ import annotations

import pytest
import torch

from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.autograd import cast
from lightning_lpsgld.random import DrawKey

A, E = DrawKey(3, step=1, stream=5), DrawKey(3, step=1, stream=6)
FORMATS = ["bfp8", "fixed8.5", "e4m3", "bfp8-tensor"]


def _pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 4, 3, 5, 2, generator=generator).to(dtype)
    return x.requires_grad_(), g


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fmt", FORMATS)
def test_each_direction_is_quantize_under_its_key(fmt, dtype, backend):
    x, g = _pair(dtype)
    backend = "auto" if backend == "cpu" else backend  # float64 is not the fused kernel's
    out = cast(x, fmt, fmt, activation_key=A, error_key=E, backend=backend)
    out.backward(g)
    assert torch.equal(out, quantize(x, fmt, key=A, backend=backend))
    assert torch.equal(x.grad, quantize(g, fmt, key=E, backend=backend))


def test_none_is_the_identity_in_its_direction():
    x, g = _pair()
    forward_only = cast(x, "bfp8", None, activation_key=A)
    forward_only.backward(g)
    assert torch.equal(x.grad, g)
    x.grad = None
    backward_only = cast(x, None, "bfp8", error_key=E)
    backward_only.backward(g)
    assert torch.equal(backward_only, x)
    assert torch.equal(x.grad, quantize(g, "bfp8", key=E))
    assert cast(x, None, None) is x


def test_gradients_of_several_consumers_are_summed_before_they_are_rounded_once():
    x, g = _pair()
    out = cast(x, "bfp8", "bfp8", activation_key=A, error_key=E)
    ((out * g).sum() + (out * (2 * g)).sum()).backward()
    assert torch.equal(x.grad, quantize(g + 2 * g, "bfp8", key=E))


def test_without_gradients_it_only_rounds():
    x, _ = _pair()
    with torch.no_grad():
        out = cast(x, "bfp8", "bfp8", activation_key=A, error_key=E)
    assert not out.requires_grad
    assert torch.equal(out, quantize(x, "bfp8", key=A))
    with torch.inference_mode():
        assert torch.equal(cast(x, "bfp8", None, activation_key=A), quantize(x, "bfp8", key=A))


def test_result_may_be_overwritten_in_place():
    for fmt in ("bfp8", None):
        x, g = _pair()
        out = cast(x, fmt, "bfp8", activation_key=A, error_key=E)
        rounded = out.detach().clone()
        out.relu_().backward(g)
        assert torch.equal(x.grad, quantize(torch.where(rounded > 0, g, 0.0), "bfp8", key=E))


def test_channels_last_and_expanded_gradients():
    x, g = _pair()
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    out = cast(last, "bfp8", "bfp8", activation_key=A, error_key=E)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, quantize(x, "bfp8", key=A))
    out.backward(g.mean().expand_as(out))
    assert torch.equal(last.grad, quantize(g.mean().expand_as(out).contiguous(), "bfp8", key=E))


def test_second_derivative_passes_straight_through():
    x = torch.tensor([0.5, -1.0], requires_grad=True)
    y = cast(x, "fixed8.6", "fixed8.6", rounding="nearest")
    (first,) = torch.autograd.grad((y**3).sum() / 64, x, create_graph=True)
    assert torch.equal(first, quantize(3 * x.detach() ** 2 / 64, "fixed8.6", rounding="nearest"))
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 6 * x.detach() / 64)


def test_a_missing_key_is_refused_before_backward():
    x, _ = _pair()
    with pytest.raises(TypeError, match="activation_key"):
        cast(x, "bfp8", None)
    with pytest.raises(TypeError, match="error_key"):
        cast(x, "bfp8", "bfp8", activation_key=A)
