r"""Choose bits, step size and temperature before training: one batch, one table, one verdict per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lpsgld.analysis.budget import BudgetUpdate, variance_budget
from lightning_lpsgld.analysis.plan_report import TOLERANCE, LayerPlan, Plan
from lightning_lpsgld.analysis.shrinkage import gradient_shrinkage
from lightning_lpsgld.formats import (
    Accumulator,
    BlockFloatingPoint,
    FormatLike,
    NumberFormat,
    parse_accumulator,
    parse_format,
)
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.random import DrawKey, Role, stream_id

__all__ = ["fraction_length_for", "plan"]

#: Points of the learning-rate schedule that are looked at.
_POINTS = 9
#: Word lengths that are tried as a remedy.
_LONGEST = 24


def fraction_length_for(x: Tensor, word_length: int, *, clip: float = 0.0, headroom: float = 1.0) -> int:
    """Largest fraction length whose range clips at most a share ``clip`` of ``x``.

    Args:
        x: Values, any shape.
        word_length: W, sign bit included.
        clip: Share of elements that may saturate, in [0, 1).
        headroom: Factor by which values may still grow.

    Returns:
        F, between -100 and 120; ``word_length - 1`` for an all-zero tensor (range ±1).

    Example:
        >>> import torch
        >>> fraction_length_for(torch.tensor([0.3, -1.2]), 8)
        6
    """
    magnitude = x.detach().double().abs().flatten() * headroom
    keep = magnitude.sort().values[: max(magnitude.numel() - int(clip * magnitude.numel()), 1)]
    top = float(keep[-1]) if keep.numel() else 0.0
    if top == 0.0:
        return word_length - 1
    largest_code = 2 ** (word_length - 1) - 1
    fraction = word_length - 1 - math.frexp(top)[1]
    if top > largest_code * 2.0**-fraction:
        fraction -= 1
    return max(-100, min(120, fraction))


def _gradients(module: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, Tensor]:
    """Gradients of the loss on one batch; buffers, ``.grad`` and the global generators are left as they were."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("plan: the module has no parameter that requires a gradient.")
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    devices = [p.device for p in named.values() if p.device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            value = loss(module, batch)
            grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads)}


def _points(lr: float | Sequence[float]) -> tuple[float, ...]:
    rates = [float(lr)] if isinstance(lr, (int, float)) else [float(rate) for rate in lr]
    if not rates or any(not rate > 0 for rate in rates):
        raise ValueError(f"plan: `lr` must be a positive step size or a non-empty sequence of them, got {lr!r}.")
    if len(rates) <= _POINTS:
        return tuple(rates)
    return tuple(rates[round(i * (len(rates) - 1) / (_POINTS - 1))] for i in range(_POINTS))


def _formats_up(fmt: NumberFormat) -> list[NumberFormat]:
    return [fmt.with_word_length(bits) or BlockFloatingPoint(bits) for bits in range(fmt.bits + 1, _LONGEST + 1)]


def _bits_of_kind(least: NumberFormat | None, sums: NumberFormat) -> int | None:
    """Bits of a format that is the sums' own or differs from it by the word length alone."""
    if least is None or (least != sums and least != sums.with_word_length(least.bits)):
        return None
    return least.bits


def _ratio(theta: Tensor, drift: Tensor, lr: float, noise: float, fmt: NumberFormat, update: BudgetUpdate) -> float:
    return float(variance_budget(theta - lr * drift, lr * noise, fmt, update=update).ratio)


def _remedy(
    theta: Tensor, drift: Tensor, rates: Sequence[float], noise: float, fmt: NumberFormat, update: BudgetUpdate
) -> NumberFormat | None:
    """Narrowest format above ``fmt`` in which the noise is as asked for at all step sizes."""
    for wider in _formats_up(fmt):
        grid = quantize(theta, wider, rounding="nearest")
        if all(_ratio(grid, drift, lr, noise, wider, update) <= TOLERANCE for lr in rates):
            return wider
    return None


def _gradient_variance(grad: Tensor, fmt: NumberFormat | None) -> float:
    """Mean variance of the stochastic rounding of a gradient, the next exponent of its blocks included."""
    return 0.0 if fmt is None else float(variance_budget(grad, 0.0, fmt).achieved)


def _verdict(
    heat: float,
    clipped: float,
    held: float,
    from_gradient: float,
    least: NumberFormat | None,
    sums: NumberFormat,
    fraction: int | None,
) -> str:
    notes = []
    if held > 0:
        notes.append(f"{held:.1%} of the blocks held below a power of two by clamping")
    if clipped > 0 and fraction is not None:
        notes.append(f"clipped: use F = {fraction}")
    if from_gradient > TOLERANCE - 1.0:
        notes.append(f"gradient rounding adds {from_gradient:.2g} x the target noise: finer gradients")
    if heat > TOLERANCE:
        more = (
            "a full accumulator"
            if least is None
            else f"{least.bits} bits"
            if type(least) is type(sums)
            else f"sums in {least}"
        )
        notes.append(f"{heat:.3g} times too much noise: {more}, or T x {heat:.3g}")
    return "; ".join(notes) or "ok"


def plan(
    module: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    lr: float | Sequence[float],
    num_data: int,
    temperature: float = 1e-3,
    weight_decay: float = 0.0,
    weights: FormatLike = "bfp8",
    gradients: FormatLike | None = None,
    update: BudgetUpdate = "vc",
    accumulator: FormatLike = "low",
    samples: int = 0,
) -> Plan:
    r"""Predict what a low-precision sampler would do to a module, from its weights and one batch.

    For every trainable tensor and several points of the step-size schedule it compares the noise that one step delivers
    with the target :math:`v = 2\eta T/N` (:func:`.variance_budget`), with the weights on their grid and the batch's
    gradient as the drift. The weights are those of now: plan again after some training. The noise of the minibatch
    itself is not counted: it is the same at full precision.

    Args:
        module: Any module; its parameters, buffers and gradients are left as they are.
        batch: What ``loss`` takes.
        loss: ``loss(module, batch)``, the batch-mean loss as a 0-d tensor; of a LightningModule, say,
            ``lambda module, batch: module.training_step(batch, 0)``.
        lr: Step size, or the step sizes of the planned schedule in order.
        num_data: N, number of training examples.
        temperature: T.
        weight_decay: λ; enters the drift as in the sampler.
        weights: Format of the weights.
        gradients: Format of the gradients (rounded stochastically; the column ``q nearest`` shows what would be left of
            them with rounding to nearest); ``None``: not quantized.
        update: ``"vc"``, ``"naive"`` (accumulators on a grid) or ``"full"``.
        accumulator: Where the steps are summed: ``"low"``: in the weights. A format: on that grid beside them; budgets
            and remedies are then its. ``"full"`` says the same as ``update="full"``.
        samples: Posterior samples that will be kept, for the memory line.

    Returns:
        A :class:`Plan`; print it.

    Raises:
        ValueError: If a step size, N or T is not positive, or nothing is trainable.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 2)
        >>> data = torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1])
        >>> out = plan(net, data, loss, lr=0.1, num_data=1000, weights="fixed8.6")
        >>> [layer.name for layer in out.layers]
        ['weight', 'bias']
    """
    for name, value in (("num_data", num_data), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"plan: `{name}` must be > 0, got {value}.")
    fmt, rates, wide = parse_format(weights), _points(lr), parse_accumulator(accumulator, owner="plan")
    update = "full" if wide == "full" else update
    gradient_format = None if gradients is None else parse_format(gradients)
    grads = _gradients(module, batch, loss)
    named = dict(module.named_parameters())
    noise = 2.0 * temperature / num_data
    layers = []
    for index, (name, grad) in enumerate(grads.items()):
        theta = named[name].detach()
        rounded = grad
        if gradient_format is not None:
            key = DrawKey(0, stream=stream_id(Role.PROBE, index))
            rounded = quantize(grad, gradient_format, key=key)
        drift = rounded + weight_decay * theta
        layers.append(_layer(name, theta, grad, drift, rates, noise, temperature, fmt, gradient_format, update, wide))
    return Plan(tuple(layers), fmt, gradient_format, update, temperature, num_data, rates, samples, wide)


def _layer(
    name: str,
    theta: Tensor,
    grad: Tensor,
    drift: Tensor,
    rates: tuple[float, ...],
    noise: float,
    temperature: float,
    fmt: NumberFormat,
    gradient_format: NumberFormat | None,
    update: BudgetUpdate,
    accumulator: Accumulator,
) -> LayerPlan:
    """One row; ``noise`` is the target variance per unit of step size."""
    sums = fmt if isinstance(accumulator, str) else accumulator
    grid = quantize(theta, sums, rounding="nearest")
    budgets = tuple(variance_budget(grid - lr * drift, lr * noise, sums, update=update) for lr in rates)
    ratios = [float(budget.ratio) for budget in budgets]
    extra = tuple(lr * _gradient_variance(grad, gradient_format) / noise for lr in rates)
    heat = sum(ratios) / len(ratios)
    least: NumberFormat | None = sums
    if max(ratios) > TOLERANCE:
        least = _remedy(theta, drift, rates, noise, sums, update)
    held = max(float(budget.held) for budget in budgets) if sums.blocks.shared else 0.0
    shrinkage = None
    if gradient_format is not None:
        shrinkage = gradient_shrinkage(quantize(grad, gradient_format, rounding="nearest"), grad)
    clipped = float(variance_budget(theta, 0.0, fmt).saturated)
    fraction = fraction_length_for(theta, min(fmt.bits, 24))
    own = None if fmt.gap is None else fraction
    return LayerPlan(
        name=name,
        shape=tuple(theta.shape),
        largest=float(theta.abs().max()) if theta.numel() else 0.0,
        fraction_length=fraction,
        clipped=clipped,
        gradient_rms=float(grad.double().square().mean().sqrt()),
        shrinkage=shrinkage,
        budgets=budgets,
        gradient_noise=extra,
        effective_temperature=temperature * (heat + sum(extra) / len(extra)),
        weight_bytes=fmt.stored_bytes(theta.shape),
        accumulator_bytes=4 * theta.numel()
        if update == "full"
        else 0
        if sums is fmt
        else sums.stored_bytes(theta.shape),
        remedy_bits=_bits_of_kind(least, sums),
        verdict=_verdict(heat, clipped, held, max(extra), least, sums, own),
        least=least,
    )
