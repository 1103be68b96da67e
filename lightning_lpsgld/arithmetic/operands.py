"""From tensors to operands: integer codes and scales of a weight's rows and of an activation, where they are exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.arithmetic.products import PackedWeight
from lightning_lpsgld.formats import BlockFloatingPoint, NumberFormat
from lightning_lpsgld.ops import Encoded, decode, encode
from lightning_lpsgld.ops.coded import plain

__all__ = ["WeightCodes", "activation_scales", "refusal_of_format"]

_ROWS = BlockFloatingPoint(8)


def refusal_of_format(fmt: NumberFormat | None) -> str | None:
    """Why activations of a format cannot be multiplied as integers; ``None`` if they can.

    Args:
        fmt: Format of the activations; ``None``: they are not rounded.

    Returns:
        The reason in words, or ``None``.
    """
    if fmt is None:
        return "activations are not rounded"
    if not fmt.linear:
        return f"codes of {fmt} are not integers"
    if fmt.bits > 8:
        return f"codes of {fmt} have more than 8 bits"
    if fmt.blocks.shared and not fmt.blocks.by_sample:
        return f"blocks of {fmt} do not span a whole sample"
    return None


def activation_scales(encoded: Encoded, ndim: int) -> Tensor | float:
    """Gap of an activation: a power of two, or one per sample, shaped to multiply a tensor of ``ndim`` dims."""
    fmt = encoded.format
    if fmt.gap is not None:
        return fmt.gap
    gaps = fmt.gaps(encoded.exponents).float()
    return gaps if gaps.ndim == 0 else gaps.view(-1, *[1] * (ndim - 1))


class WeightCodes:
    """Packed weights, kept as long as a weight does not change.

    A weight has codes if every row is integers of at most 8 bits times a power of two; that is looked up in its values,
    whatever format they were rounded to, once per change: once per posterior sample, not once per batch.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[int, int, PackedWeight | None]] = {}

    def of(self, weight: Tensor, owner: Tensor | None) -> PackedWeight | None:
        """Codes of a weight.

        Args:
            weight: Shape ``(out, ...)``.
            owner: The weight, or the one that it is a slice of, if that outlives the call: then they are kept.

        Returns:
            The codes; ``None`` if it has none.
        """
        if owner is None:
            return _rows_of(plain(weight.detach()))
        version = 0 if owner.is_inference() else owner._version
        part = (id(owner), weight.storage_offset(), weight.shape, weight.stride())
        known = self._known.get(part)
        if known is None or known[:2] != (version, owner.data_ptr()):
            known = self._known[part] = (version, owner.data_ptr(), _rows_of(plain(weight.detach())))
        return known[2]

    def clear(self) -> None:
        """Let go of all."""
        self._known.clear()


def _rows_of(weight: Tensor) -> PackedWeight | None:
    if weight.numel() == 0 or weight.dtype != torch.float32 or not bool(weight.isfinite().all()):
        return None
    dense = weight.contiguous()
    encoded = encode(dense, _ROWS, rounding="nearest")
    if not torch.equal(decode(encoded), dense):
        return None
    return PackedWeight(encoded.codes, _ROWS.gaps(encoded.exponents).float())
