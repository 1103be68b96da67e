"""BatchNorm statistics of a posterior sample, measured instead of inherited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lpsgld.predictive.batches import default_logits, device_of, to_device

__all__ = ["refresh_batch_norm"]


def _tracking(module: nn.Module) -> list[_BatchNorm]:
    parts = (part for part in module.modules() if isinstance(part, _BatchNorm))
    return [part for part in parts if part.running_mean is not None]


@contextmanager
def _measuring(module: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Evaluation mode, but for ``layers``, which average the statistics of their batches."""
    flags = [(part, part.training) for part in module.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    module.eval()
    for layer in layers:
        layer.train()
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for part, training in flags:
            part.training = training


@torch.no_grad()
def refresh_batch_norm(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] = default_logits,
    device: torch.device | str | None = None,
) -> int:
    r"""Measure the running statistics of every BatchNorm layer anew, for the weights that the module has now.

    With the statistics of batch i being :math:`m_i, s_i`, the layers get the plain averages :math:`\frac1n\sum_i m_i`
    and :math:`\frac1n\sum_i s_i`: batches count equally, so the last one should not be much smaller. Only the
    BatchNorm layers are in training mode; dropout is off, as it is when the statistics are used.

    Args:
        module: The module; its other buffers, momenta and training flags are as before afterwards.
        batches: Training inputs: tensors, tuples or lists with the inputs first, or mappings with a usual key.
        forward: Called as ``forward(module, batch)``; for other batches.
        device: Where batches are moved; the module's device by default.

    Returns:
        Number of layers refreshed; with 0, ``batches`` is not touched.

    Raises:
        ValueError: If there are BatchNorm layers but no batch; the statistics are unchanged then.

    Example:
        >>> import torch
        >>> module = torch.nn.BatchNorm1d(1)
        >>> refresh_batch_norm(module, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        1
        >>> module.running_mean
        tensor([4.])

    Reference:
        Izmailov et al., 2018 (SWA), arXiv:1803.05407, section 3.2.
    """
    layers = _tracking(module)
    if not layers:
        return 0
    target = device_of(module) if device is None else device
    count = 0
    with _measuring(module, layers):
        for count, batch in enumerate(batches, start=1):
            if count == 1:
                for layer in layers:
                    layer.reset_running_stats()
            forward(module, to_device(batch, target))
    if count == 0:
        raise ValueError("refresh_batch_norm got no batch; pass training data that can be iterated repeatedly.")
    return len(layers)
