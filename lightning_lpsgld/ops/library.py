"""The ops in PyTorch's operator library, for ``torch.compile``: one node in the graph, whatever backend runs it.

A compiled module that calls :func:`lightning_lpsgld.ops.quantize` (or the other three) keeps its graph whole: while
Dynamo traces, the call becomes ``torch.ops.lpsgld.quantize`` and the backend is chosen when the node runs. A key's
fields travel as ints: one that changes every call (the step) becomes dynamic at its first change, which costs one
recompilation, **if it reaches the compiled function as an argument or from a local object**. Dynamo compiles in ints
that it finds on an ``nn.Module`` or in a global: there every step would recompile. For those there is
:func:`quantize_keyed`, whose key is a tensor.

The module is imported when a graph is first traced: registering operators is a third of what importing the package
would take. Import it before loading a graph that another process has saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.formats import code_dtype, parse_format
from lightning_lpsgld.ops.dispatch import choose
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.random import DrawKey

__all__ = [
    "cast_node",
    "decode",
    "encode",
    "key_fields",
    "key_tensor",
    "quantize",
    "quantize_keyed",
    "quantize_variance_corrected",
]


def key_fields(key: DrawKey | None) -> tuple[int, int, int, int]:
    """A key as four ints that fit int64: seed (two's complement), step, stream, offset."""
    if key is None:
        return 0, 0, 0, 0
    return key.seed - 2**64 if key.seed >= 2**63 else key.seed, key.step, key.stream, key.offset


def key_tensor(key: DrawKey) -> Tensor:
    """A key as an int64 tensor of four, on the CPU so that reading it waits for no device."""
    return torch.tensor(key_fields(key), dtype=torch.int64)


def _in_layout_of(out: Tensor, x: Tensor) -> Tensor:
    """``out`` with the strides that the fake implementation promised."""
    like = torch.empty_like(x, dtype=out.dtype)
    return out if out.stride() == like.stride() else like.copy_(out)


@torch.library.custom_op("lpsgld::quantize", mutates_args=())
def quantize(
    x: Tensor, fmt: str, rounding: str, seed: int, step: int, stream: int, offset: int, backend: str
) -> Tensor:
    """:func:`lightning_lpsgld.ops.quantize` with the format as a string and the key as :func:`key_fields`."""
    number, key = parse_format(fmt), DrawKey(seed, step, stream, offset)
    return _in_layout_of(choose(backend, "quantize", x, number).quantize(x, number, rounding, key), x)


@quantize.register_fake
def _(x: Tensor, fmt: str, rounding: str, seed: int, step: int, stream: int, offset: int, backend: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lpsgld::quantize_keyed", mutates_args=())
def quantize_keyed(x: Tensor, fmt: str, rounding: str, key: Tensor, backend: str) -> Tensor:
    """:func:`quantize` with the key as a tensor (:func:`key_tensor`): no value of it is ever compiled in.

    For a step that lives on a module or in a global: change the tensor in place between calls.
    """
    number = parse_format(fmt)
    out = choose(backend, "quantize", x, number).quantize(x, number, rounding, DrawKey(*key.tolist()))
    return _in_layout_of(out, x)


@quantize_keyed.register_fake
def _(x: Tensor, fmt: str, rounding: str, key: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lpsgld::quantize_variance_corrected", mutates_args=())
def quantize_variance_corrected(
    mean: Tensor, variances: Tensor | None, variance: float, fmt: str, seed: int, step: int, stream: int, offset: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """:func:`lightning_lpsgld.ops.quantize_variance_corrected`; ``variance`` counts where ``variances`` is ``None``."""
    number, key = parse_format(fmt), DrawKey(seed, step, stream, offset)
    spread = variance if variances is None else variances
    op = choose(backend, "quantize_variance_corrected", mean, number).quantize_variance_corrected
    return _in_layout_of(op(mean, spread, number, key), mean)


@quantize_variance_corrected.register_fake
def _(
    mean: Tensor, variances: Tensor | None, variance: float, fmt: str, seed: int, step: int, stream: int, offset: int,
    backend: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(mean)


@torch.library.custom_op("lpsgld::encode", mutates_args=())
def encode(
    x: Tensor, fmt: str, rounding: str, seed: int, step: int, stream: int, offset: int, backend: str
) -> tuple[Tensor, Tensor]:
    """:func:`lightning_lpsgld.ops.encode` as codes and exponents (an empty tensor where the format has none)."""
    number, key = parse_format(fmt), DrawKey(seed, step, stream, offset)
    encoded: Encoded = choose(backend, "encode", x, number).encode(x, number, rounding, key)
    exponents = encoded.exponents
    if exponents is None:
        exponents = torch.empty(0, dtype=torch.int8, device=x.device)
    return encoded.codes.contiguous(), exponents.contiguous()


@encode.register_fake
def _(
    x: Tensor, fmt: str, rounding: str, seed: int, step: int, stream: int, offset: int, backend: str
) -> tuple[Tensor, Tensor]:
    number = parse_format(fmt)
    shape = number.blocks.compact(x.shape)
    return x.new_empty(x.shape, dtype=code_dtype(number)), x.new_empty(shape, dtype=torch.int8)


@torch.library.custom_op("lpsgld::decode", mutates_args=())
def decode(codes: Tensor, exponents: Tensor | None, fmt: str, dtype: torch.dtype, backend: str) -> Tensor:
    """:func:`lightning_lpsgld.ops.decode` of the parts of an :class:`Encoded`."""
    number = parse_format(fmt)
    encoded = Encoded(codes, exponents if number.blocks.shared else None, number)
    out: Tensor = choose(backend, "decode", codes, number).decode(encoded, dtype)
    return out.contiguous()


@decode.register_fake
def _(codes: Tensor, exponents: Tensor | None, fmt: str, dtype: torch.dtype, backend: str) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


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
    """:func:`lightning_lpsgld.ops.cast` as one node of a compiled graph, its backward included.

    Args:
        x: As for :func:`lightning_lpsgld.ops.cast`; not checked.
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
    return _in_layout_of(out, x)


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
