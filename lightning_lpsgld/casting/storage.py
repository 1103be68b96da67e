"""Recognising a tensor, or a view of it, when it comes back: by its storage, not by its Python object."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lpsgld.casting.pending import Pending

__all__ = ["StorageTag", "storage_pointer"]


def storage_pointer(x: Tensor) -> int:
    """Address of the first byte of the storage, shared by all views; 0 where there is none (sparse, nested, empty)."""
    if isinstance(x, Pending) and x.waits:
        return 0
    return x.untyped_storage().data_ptr() if x.layout is torch.strided and not x.is_nested else 0


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class StorageTag:
    """Weak mark on a tensor's storage and content.

    Args:
        x: The tensor; the tag does not keep its memory.
    """

    __slots__ = ("_ref", "_version", "offset", "size", "stride")

    def __init__(self, x: Tensor) -> None:
        self._ref = StorageWeakRef(x.untyped_storage())
        self._version = _version(x)
        self.size, self.stride, self.offset = x.size(), x.stride(), x.storage_offset()

    @property
    def expired(self) -> bool:
        """Whether the memory has been freed; its address may then belong to another tensor."""
        return bool(self._ref.expired())

    def holds(self, x: Tensor) -> bool:
        """Whether ``x``, found at the address of the tagged storage, is that storage, not overwritten since."""
        return not self.expired and _version(x) == self._version

    def is_whole(self, x: Tensor) -> bool:
        """Whether ``x`` has the geometry of the tagged tensor, rather than that of another view."""
        return (x.size(), x.stride(), x.storage_offset()) == (self.size, self.stride, self.offset)
