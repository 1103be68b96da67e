"""The autograd pair: a quantizer for activations on the way forward, another for errors on the way back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import FormatLike, parse_format
from lightning_lpsgld.ops.dispatch import BackendName, choose
from lightning_lpsgld.ops.functional import quantize
from lightning_lpsgld.random import DrawKey

__all__ = ["Rounder", "cast", "cast_node", "cast_with"]

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


@torch.library.custom_op("lpsgld::cast", mutates_args=())
def cast_node(
    x: Tensor,
    key: Tensor,
    activation_format: str | None,
    activation_stream: int,
    error_format: str | None,
    error_stream: int,
    rounding: str,
    backend: str,
) -> Tensor:
    """:func:`cast` as one node of a compiled graph, its backward included.

    Args:
        x: As for :func:`cast`; not checked.
        key: int64 tensor (seed in two's complement, step) on the CPU. Its values are read when the node runs, so that
            a new step compiles nothing.
        activation_format: Grid as a string, or ``None``: the result is a copy.
        activation_stream: Stream of Q_A.
        error_format: Grid as a string, or ``None``.
        error_stream: Stream of Q_E.
        rounding: Of Q_A; errors are rounded stochastically.
        backend: As for :func:`lightning_lpsgld.ops.quantize`.

    Returns:
        Tensor like ``x``, in new memory.
    """
    if activation_format is None:
        return x.clone()
    seed, step = key.tolist()
    number = parse_format(activation_format)
    draws = DrawKey(seed, step, activation_stream) if rounding == "stochastic" else None
    out: Tensor = choose(backend, "quantize", x, number).quantize(x, number, rounding, draws)
    like = torch.empty_like(x)  # the strides that the fake implementation promises
    return out if out.stride() == like.stride() else like.copy_(out)


@cast_node.register_fake
def _(
    x: Tensor,
    key: Tensor,
    activation_format: str | None,
    activation_stream: int,
    error_format: str | None,
    error_stream: int,
    rounding: str,
    backend: str,
) -> Tensor:
    return torch.empty_like(x)


def _remember_error(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, key, _, _, error_format, error_stream, _, backend = inputs
    ctx.error = (error_format, error_stream, backend)
    ctx.save_for_backward(key)


def _round_error(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    fmt, stream, backend = ctx.error
    (key,) = ctx.saved_tensors
    if fmt is not None:  # a second derivative passes straight through
        grad = cast_node(grad, key, fmt, stream, None, 0, "stochastic", backend)
    return (grad, *[None] * 7)


cast_node.register_autograd(_round_error, setup_context=_remember_error)
