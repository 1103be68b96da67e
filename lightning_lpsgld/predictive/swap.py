"""Borrowing a module: its weights and modes are put back exactly, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["swapped_weights"]


def _copies(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return [(tensor, tensor.detach().clone(memory_format=torch.preserve_format)) for tensor in tensors.values()]


@contextmanager
def swapped_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Let the block do what it likes with the weights of ``module``; restore them bit for bit afterwards.

    Saved and restored, also when the block raises: the values of all parameters and buffers (BatchNorm statistics and
    non-persistent buffers included) and the training flag of every submodule. Values are copied back into the tensors
    that the module had, so optimizers and hooks keep their references. Costs one copy of the module on its device.

    Args:
        module: The module to borrow.

    Yields:
        The module.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(2, 1)
        >>> before = module.weight.detach().clone()
        >>> with swapped_weights(module):
        ...     _ = torch.nn.init.zeros_(module.weight)
        >>> torch.equal(module.weight, before)
        True
    """
    saved = _copies(module)
    flags = [(part, part.training) for part in module.modules()]
    try:
        yield module
    finally:
        with torch.no_grad():
            for tensor, copy in saved:
                tensor.copy_(copy)
        for part, training in flags:
            part.training = training
