"""Coupled: gradients with saved activations kept as codes are those without; and the memory is really gone."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers.small_resnet import SmallResNet
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_lpsgld.casting import ActivationCasting


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(4, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class _Views(nn.Module):
    """Consumers that save views, transposes and slices of a rounded activation, and several that save the same one."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.relu = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(4, 3), nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.a(x))  # (batch, time, 8)
        h = h + self.b(h) * h.transpose(0, 1).contiguous().transpose(0, 1)
        h = F.relu(h, inplace=True)
        return self.c(h[..., 2:6]).square() + self.c(h.transpose(1, 2)[:, :4].transpose(1, 2)) * h[..., :3]


NETWORKS = {
    # 16 channels: oneDNN's backward of a strided 1 x 1 convolution writes past its workspace where a channels-last
    # input has fewer channels than a vector block (oneDNN issue 6035), and ends the process, with or without us.
    "resnet": (lambda: SmallResNet(16), (2, 3, 32, 32)),
    "mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=3, dropout=0.0, width_mult=0.25),
        (2, 3, 32, 32),
    ),
    "transformer": (_Transformer, (3, 5, 4)),
    "lstm": (lambda: nn.Sequential(nn.LSTM(4, 8, batch_first=True), _Last(), nn.ReLU(), nn.Linear(8, 3)), (3, 5, 4)),
    "views": (_Views, (3, 5, 4)),
    "views, in place": (lambda: _Views(inplace=True), (3, 5, 4)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2)), (5, 4)),
}


class _Last(nn.Module):
    def forward(self, outputs) -> Tensor:
        return outputs[0][:, -1]


def _run(
    net: nn.Module, x: Tensor, saved: str, fmt: str, backward: int = 1, steps: int = 2
) -> tuple[list[Tensor], ActivationCasting]:
    net = copy.deepcopy(net)
    x = x.detach().clone().requires_grad_()
    casting = ActivationCasting(net, fmt, fmt, seed=3, saved_activations=saved).attach()
    found: list[Tensor] = []
    for _ in range(steps):
        with casting.forward_context():
            out = net(x)
        for turn in range(backward):
            out.square().sum().backward(retain_graph=turn < backward - 1)
        found += [out.detach(), x.grad.clone(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
    casting.remove()
    return found, casting


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "contiguous") for name in NETWORKS), ("resnet", "channels_last"), ("mobilenet", "channels_last")],
)
def test_gradients_are_bit_identical(name, layout):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    net, x = build(), torch.randn(shape)
    if layout == "channels_last":
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    full, _ = _run(net, x, "full", "bfp8")
    codes, _ = _run(net, x, "codes", "bfp8")
    assert _equal(full, codes)


@pytest.mark.parametrize(
    "fmt",
    [
        *("bfp8", "fixed8.4", "e4m3", "e5m2", "bfp8-tensor", "bfp8b32", "bfp4", "bfp12", "bf16", "mxfp8e4m3"),
        *("e2m1", "bfp3"),
    ],
)
@pytest.mark.parametrize("name", ["views", "views, in place", "mlp"])
def test_gradients_are_bit_identical_in_every_format(name, fmt):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    net, x = build(), torch.randn(shape)
    assert _equal(_run(net, x, "full", fmt)[0], _run(net, x, "codes", fmt)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_are_bit_identical_in_other_dtypes(dtype):
    torch.manual_seed(0)
    net, x = _Views().to(dtype), torch.randn(3, 5, 4, dtype=dtype)
    assert _equal(_run(net, x, "full", "bfp8")[0], _run(net, x, "codes", "bfp8")[0])


def test_a_graph_can_be_used_twice():
    torch.manual_seed(0)
    net, x = _Views(), torch.randn(3, 5, 4)
    assert _equal(_run(net, x, "full", "bfp8", backward=2)[0], _run(net, x, "codes", "bfp8", backward=2)[0])


def test_a_positive_value_that_rounds_to_zero_keeps_its_gradient():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        net[2].weight.fill_(1.0)
    x = torch.tensor([[1.0, 2.0**-7]])
    zeros = 0
    for seed in range(40):
        casting = ActivationCasting(net, "bfp8", None, seed=seed, exclude=["0"], saved_activations="codes").attach()
        leaf = x.clone().requires_grad_()
        with casting.forward_context():
            out = net(leaf)
        out.sum().backward()
        casting.remove()
        zeros += int(out == 1.0)
        assert torch.equal(leaf.grad, torch.ones(1, 2))
    assert zeros > 0  # each with probability one half


def test_nan_falls_back_to_full_tensors():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    x[0, 0] = torch.nan
    for saved in ("full", "codes"):
        found, _ = _run(net, x, saved, "bfp8", steps=1)
        assert found[0].isnan().any()
        assert found[-1].isnan().any()


def test_overwriting_what_backward_needs_is_still_an_error():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    casting = ActivationCasting(net, saved_activations="codes").attach()
    weight = torch.ones(2, requires_grad=True)
    scale = weight * 2
    with casting.forward_context():
        loss = (net(torch.randn(3, 4)) * scale).sum()
    scale.data.mul_(1)  # hidden from autograd, as everywhere
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        loss.backward()
    casting.remove()


def test_memory_reused_by_another_tensor_is_not_taken_for_a_rounded_activation():
    """Rounded activations are freed at once; the allocator hands their addresses to others."""
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.SiLU())])
    x = torch.randn(16, 64)
    assert _equal(_run(net, x, "full", "bfp8", steps=3)[0], _run(net, x, "codes", "bfp8", steps=3)[0])


def _bytes_kept(saved: str | None, net: nn.Module, x: Tensor, fmt: str = "bfp8") -> int:
    """Bytes that live after a forward and did not before, by the allocator's own account."""
    net = copy.deepcopy(net)
    casting = None if saved is None else ActivationCasting(net, fmt, seed=1, saved_activations=saved).attach()
    context = contextlib.nullcontext if casting is None else casting.forward_context
    with context():
        net(x).sum()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, context():
        loss = net(x).sum()
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def test_bytes_kept_for_backward():
    torch.manual_seed(0)
    net, x = SmallResNet(16), torch.randn(8, 3, 32, 32)
    plain = _bytes_kept(None, net, x)
    eight = _bytes_kept("codes", net, x)
    assert eight <= 0.3 * plain
    assert _bytes_kept("full", net, x) >= plain
    assert _bytes_kept("codes", net, x, "bfp4") <= 0.51 * eight


def test_nothing_is_held_once_the_context_is_left():
    net, x = SmallResNet(8), torch.randn(2, 3, 32, 32)
    casting = ActivationCasting(net, seed=1, saved_activations="codes").attach()
    with casting.forward_context():
        net(x)
    session = casting._session
    assert len(session.caster.book) == 0
    assert not session.tracker._held
    assert not session.ends._ends
    assert session.calls.call is None
    casting.remove()
