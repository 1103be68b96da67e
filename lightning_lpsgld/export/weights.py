"""Weights of all samples in the form that an exported file keeps: integer codes and power-of-two scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lpsgld.bank import EntrySpec, Sample, SampleBank
from lightning_lpsgld.ops import Encoded

__all__ = ["PackedTensor", "pack"]


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the module, of all samples.

    Attributes:
        name: As in the ``state_dict``.
        values: Codes (int8, int16) or values, shape ``(samples, *shape)``.
        scales: Powers of two, float32, shape ``(samples, ...)``, that broadcasts against ``values``; ``None``: values.
    """

    name: str
    values: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        extra = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return self.values.numel() * self.values.element_size() + extra

    def decoded(self) -> Tensor:
        """Values of all samples."""
        return self.values if self.scales is None else self.values.float() * self.scales


def _scales(encoded: Encoded) -> Tensor | None:
    """Gap of each block of a linear format, in a shape that broadcasts; ``None`` for other formats."""
    fmt = encoded.format
    if not fmt.linear:
        return None
    expanded = fmt.blocks.expand(fmt.gaps(encoded.exponents).float(), encoded.codes.shape)
    return expanded.reshape((1,) * encoded.codes.ndim) if expanded.ndim == 0 else expanded


def _codes(entry: EntrySpec, samples: list[Sample]) -> PackedTensor | None:
    parts = [sample.entries[entry.name] for sample in samples]
    encoded = [part for part in parts if isinstance(part, Encoded)]
    scales = [scale for scale in map(_scales, encoded) if scale is not None]
    if len(scales) < len(samples) or entry.dtype != torch.float32:
        return None
    packed = PackedTensor(entry.name, torch.stack([e.codes for e in encoded]), torch.stack(scales))
    exact = torch.stack([sample.state_dict()[entry.name] for sample in samples])
    # one exponent an element (biases, BatchNorm scales) costs more than the values themselves
    smaller = packed.nbytes < exact.numel() * exact.element_size()
    return packed if smaller and torch.equal(packed.decoded(), exact) else None


def pack(bank: SampleBank) -> list[PackedTensor]:
    """Tensors of all samples, in the module's order; tied ones once.

    Those of fixed point and block floating point become codes and scales where that is smaller; everything else keeps
    its values. Nothing is rounded.

    Args:
        bank: The samples.

    Returns:
        One entry a tensor.

    Raises:
        ValueError: If the bank is empty.
    """
    if not len(bank) or bank.spec is None:
        raise ValueError(f"export: {bank!r} has no usable sample; collect some first.")
    samples = list(bank)
    found = []
    for entry in bank.spec.entries:
        coded = None if entry.format is None else _codes(entry, samples)
        if coded is None:
            coded = PackedTensor(entry.name, torch.stack([s.state_dict()[entry.name] for s in samples]), None)
        found.append(coded)
    return found
