"""What a batch is when nobody says so: inputs, targets, and how both get to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "DataError",
    "by_keyword",
    "default_inputs",
    "default_logits",
    "default_targets",
    "device_of",
    "required_targets",
    "to_device",
    "with_targets",
]

_INPUTS = ("inputs", "input", "images", "image", "x", "features", "data")
_TARGETS = ("targets", "target", "labels", "label", "y")
#: Keys by which models of Hugging Face name their inputs; such a batch is passed on by keyword.
_KEYWORDS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


class DataError(ValueError):
    """There is no batch, or targets are missing from one, or they do not fit what is predicted."""


def device_of(module: nn.Module) -> torch.device:
    """Device of the module's first parameter or buffer; the CPU if it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Copy of nested tuples, lists and mappings with every tensor on ``device``; anything else is passed through."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _named(batch: Mapping[str, Any], names: tuple[str, ...], what: str) -> Any:
    for name in names:
        if name in batch:
            return batch[name]
    raise ValueError(f"No {what} among the keys {sorted(map(str, batch))} of a batch; pass a function that takes them.")


def default_inputs(batch: Any) -> Any:
    """First element of a tuple or list, the usual key of a mapping, or the batch itself.

    Args:
        batch: What a dataloader gives.

    Returns:
        The inputs, as they are in the batch.

    Raises:
        ValueError: If a mapping has none of the usual keys.
    """
    if isinstance(batch, Mapping):
        return _named(batch, _INPUTS, "inputs")
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def default_targets(batch: Any) -> Tensor | None:
    """Second element of a tuple or list, the usual key of a mapping, else ``None``.

    Args:
        batch: What a dataloader gives.

    Returns:
        The targets, or ``None`` where there are none.
    """
    if isinstance(batch, Mapping):
        found = [batch[name] for name in _TARGETS if name in batch]
        return found[0] if found else None
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def required_targets(batch: Any, targets: Callable[[Any], Any], who: str, purpose: str) -> Any:
    """The targets of a batch.

    Args:
        batch: What a dataloader gives.
        targets: Takes them from it.
        who: Who needs them, for the message.
        purpose: What for.

    Raises:
        DataError: If there are none.
    """
    truth = targets(batch)
    if truth is None:
        raise DataError(
            f"{who}: a batch has no targets to {purpose} with. It takes (inputs, targets), or a mapping with one of "
            f"{', '.join(_TARGETS)}; in Python, pass targets=function(batch)."
        )
    return truth


def with_targets(
    batches: Iterable[Any], targets: Callable[[Any], Any], who: str, purpose: str
) -> Iterator[tuple[Any, Any]]:
    """Batches and their targets, as :func:`required_targets` takes them.

    Raises:
        DataError: If a batch has none, or there is no batch.
    """
    found = False
    for batch in batches:
        found = True
        yield batch, required_targets(batch, targets, who, purpose)
    if not found:
        raise DataError(f"{who}: got no batch of held-out data to {purpose} with.")


def by_keyword(batch: Any) -> dict[str, Any] | None:
    """Tensors of a tokenized batch by name, without the labels; ``None`` of any other batch."""
    if not isinstance(batch, Mapping) or any(name in batch for name in _INPUTS):
        return None
    if not any(name in batch for name in _KEYWORDS):
        return None
    return {name: value for name, value in batch.items() if name not in _TARGETS}


def default_logits(module: nn.Module, batch: Any) -> Any:
    """``module(inputs)`` of :func:`default_inputs`; ``module(**inputs)`` without the labels for tokenized batches.

    A batch counts as tokenized if it is a mapping with ``input_ids``, ``pixel_values`` or the like, and none of the
    usual names of inputs.

    Args:
        module: Called with the inputs.
        batch: What a dataloader gives.

    Returns:
        Whatever the module returns.
    """
    named = by_keyword(batch)
    return module(default_inputs(batch)) if named is None else module(**named)
