"""Evaluating one closure at several points without leaving a trace: buffers, generators and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["at_point", "full_gradient", "traceless"]


@contextlib.contextmanager
def _kept_buffers() -> Iterator[None]:
    """Give every module that runs inside its buffers back: BatchNorm statistics must not see the centre's activations.

    A global hook finds the modules, so nothing needs to be told about the model. The outermost module is seen first and
    all buffers below it are copied then, which also covers modules that a compiled graph runs without hooks.
    """
    saved: dict[Tensor, Tensor] = {}

    def keep(module: Module, args: Any) -> None:
        for buffer in module.buffers():
            if buffer not in saved:
                saved[buffer] = buffer.detach().clone()

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for buffer, value in saved.items():
                buffer.copy_(value)


@contextlib.contextmanager
def traceless(params: Sequence[Tensor]) -> Iterator[None]:
    """Undo what passes inside do to module buffers and to torch's generators (CPU, and the devices of ``params``).

    What runs next therefore draws the same dropout masks as the pass inside did. Generators of ``random`` and ``numpy``
    are not touched.
    """
    devices = sorted({p.device.index or 0 for p in params if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), _kept_buffers():
        yield


@contextlib.contextmanager
def at_point(params: Sequence[Tensor], values: Sequence[Tensor]) -> Generator[None, None, None]:
    """Let ``params`` hold ``values`` inside, without gradients; outside they are bit for bit as before.

    Args:
        params: Tensors that are overwritten and restored. Their ``.grad`` is ``None`` on entry.
        values: One per parameter, same shape; cast to the parameter's dtype.
    """
    with torch.no_grad():
        kept = [p.detach().clone() for p in params]
        for param, value in zip(params, values):
            param.copy_(value)
            param.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in zip(params, kept):
                param.copy_(value)


def _leading_length(batch: Any) -> int:
    first = batch
    while not isinstance(first, Tensor):
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return int(first.shape[0])


def full_gradient(
    loss_of: Callable[[Any], Tensor],
    batches: Iterable[Any],
    params: Iterable[Tensor],
    *,
    size_of: Callable[[Any], int] = _leading_length,
) -> Callable[[], Tensor]:
    r"""Make the closure that :meth:`~.variance_reduced.VarianceReduced.recentre` wants, from batches of any sizes.

    .. math::
        \nabla f(w) = \frac{\sum_b n_b \nabla f_b(w)}{\sum_b n_b}

    A mean of batch means would be biased whenever the last batch is shorter.

    Args:
        loss_of: Maps a batch to its **mean** loss, a 0-d tensor.
        batches: Iterated anew at every call, e.g. a ``DataLoader`` or a list; must cover the data once.
        params: The optimizer's parameters.
        size_of: Number of examples n_b of a batch; by default the length of dim 0 of its first tensor.

    Returns:
        A callable that leaves the mean gradient over all data in ``.grad`` (``None`` where there is none) and returns
        the mean loss.

    Raises:
        ValueError: (from the callable) If ``batches`` is empty.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(()))
        >>> batches = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
        >>> closure = full_gradient(lambda x: (w - x).square().mean() / 2, batches, [w])
        >>> _ = closure()
        >>> w.grad
        tensor(-3.)
    """
    parameters = list(params)

    def closure() -> Tensor:
        sums: list[Tensor | None] = [None] * len(parameters)
        total, count = torch.zeros(()), 0
        for batch in batches:
            size = size_of(batch)
            loss = loss_of(batch)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for i, grad in enumerate(grads):
                if grad is not None:
                    before = sums[i]
                    sums[i] = grad * size if before is None else before + grad * size
            total, count = total + loss.detach().cpu() * size, count + size
        if not count:
            raise ValueError("full_gradient: `batches` is empty, so there is no gradient to take.")
        for param, grad_sum in zip(parameters, sums):
            param.grad = None if grad_sum is None else grad_sum / count
        return total / count

    return closure
