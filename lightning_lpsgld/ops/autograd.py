"""The autograd pair: a quantizer for activations on the way forward, another for errors on the way back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import FormatLike
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.ops.functional import quantize
from lightning_lpsgld.random import DrawKey

__all__ = ["Rounder", "cast", "cast_with"]

#: A function of one tensor to a new tensor of its shape and dtype.
Rounder = Callable[[Tensor], Tensor]


class _Cast(torch.autograd.Function):
    """Straight-through pair of rounders; nothing of the tensor is saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Rounder | None, error: Rounder | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.error = error
        # Not a view: autograd forbids in-place operations (an in-place ReLU next) on views that a Function returns.
        return x.clone() if activation is None else activation(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad = grads[0]
        if grad is not None and ctx.error is not None:
            grad = cast_with(grad, ctx.error, None)  # a second derivative passes straight through
        return grad, None, None


def cast_with(x: Tensor, activation: Rounder | None, error: Rounder | None) -> Tensor:
    """As :func:`cast`, with the two roundings given as functions; either may be ``None``.

    Args:
        x: Any shape, floating dtype. Not modified.
        activation: Called once with ``x`` (detached) in forward; must return a new tensor.
        error: Called with each gradient that comes back; must return a new tensor.

    Returns:
        ``activation(x)``; ``x`` itself where there is nothing to do.
    """
    if torch.is_grad_enabled() and x.requires_grad and not (activation is None and error is None):
        out: Tensor = _Cast.apply(x, activation, error)  # type: ignore[no-untyped-call]
        return out
    return x if activation is None else activation(x)


def cast(
    x: Tensor,
    activation_format: FormatLike | None,
    error_format: FormatLike | None,
    *,
    activation_key: DrawKey | None = None,
    error_key: DrawKey | None = None,
    rounding: Literal["nearest", "stochastic"] = "stochastic",
    backend: BackendName = "auto",
) -> Tensor:
    r"""Round ``x`` now and the gradient that will flow back through it later.

    .. math::
        y = Q_A(x), \qquad \bar x = Q_E(\bar y)

    Each rounding is straight-through for the other: Q_A has derivative one, and so has Q_E in a second derivative.
    Where ``y`` has several consumers their gradients are summed first and rounded once.

    Args:
        x: Any shape, float32, float16, bfloat16 or float64. Not modified.
        activation_format: Grid of ``y``; ``None``: ``y`` is a copy of ``x`` (``x`` itself if no gradient is wanted).
        error_format: Grid of the gradient; ``None``: passed on as it is.
        activation_key: Names the draws of Q_A; required for stochastic rounding with an ``activation_format``.
        error_key: Names the draws of Q_E; required for stochastic rounding with an ``error_format``. They are made in
            backward; a second backward through a retained graph makes the same draws again.
        rounding: Of both: ``"stochastic"`` or ``"nearest"``.
        backend: As for :func:`lightning_lpsgld.ops.quantize`.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: If stochastic rounding lacks a key, or ``x`` is not a dense floating tensor.
        ValueError: As :func:`lightning_lpsgld.ops.quantize`.

    Example:
        >>> x = torch.tensor([0.3, -0.7], requires_grad=True)
        >>> y = cast(x, "fixed8.2", "fixed8.1", rounding="nearest")
        >>> (y * torch.tensor([0.7, 0.2])).sum().backward()
        >>> y.detach(), x.grad
        (tensor([ 0.2500, -0.7500]), tensor([0.5000, 0.0000]))

    Reference:
        Yang et al., 2019 (SWALP), arXiv:1904.11943, algorithm 2: where Q_A and Q_E sit.
    """
    if rounding == "stochastic":
        for name, fmt, key in (
            ("activation", activation_format, activation_key),
            ("error", error_format, error_key),
        ):
            if fmt is not None and not isinstance(key, DrawKey):
                raise TypeError(f"rounding='stochastic' needs `{name}_key=DrawKey(seed, step, stream)`, got {key!r}.")
    rounder = partial(partial, quantize, rounding=rounding, backend=backend)
    activation = None if activation_format is None else rounder(fmt=activation_format, key=activation_key)
    error = None if error_format is None else rounder(fmt=error_format, key=error_key)
    return cast_with(x, activation, error)
