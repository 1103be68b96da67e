"""What autograd keeps of cast tensors: their codes, decoded in backward, and of a ReLU the signs in the same codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.casting.codes import CodeBook, Codes
from lightning_lpsgld.ops.dispatch import BackendName

__all__ = ["ReluSigns", "SavedCodes", "saved_tensor_hooks"]


def saved_tensor_hooks() -> tuple[Any, Any] | None:
    """The pack and unpack hooks that are in force now; ``None`` without any, or without gradients."""
    if not torch.is_grad_enabled():
        return None
    query = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not public
    top: tuple[Any, Any] | None = None if query is None else query(True)
    return top


class _Saved:
    """A saved tensor that is a cast tensor or a view of one."""

    __slots__ = ("codes", "offset", "size", "stride")

    def __init__(self, codes: Codes, x: Tensor) -> None:
        self.codes, self.size, self.stride, self.offset = codes, x.size(), x.stride(), x.storage_offset()

    def unpack(self, backend: BackendName) -> Tensor:
        value, tag = self.codes.value(backend), self.codes.tag
        if (self.size, self.stride, self.offset) == (tag.size, tag.stride, tag.offset):
            return value
        return value.as_strided(self.size, self.stride, self.offset - tag.offset)


class ReluSigns:
    """Stands for the result that a ReLU saves: backward asks only where it is positive.

    Until the codes of the cast result are attached, the result itself is held.
    """

    def __init__(self, backend: BackendName) -> None:
        self._backend = backend
        self._result: Tensor | None = None
        self._codes: Codes | None = None

    def pack(self, result: Tensor) -> ReluSigns:
        """Pack hook of the ReLU."""
        self._result = result
        return self

    def attach(self, codes: Codes, raw: Tensor) -> None:
        """Let the codes stand for the result; ``raw`` is the result before rounding."""
        if self._result is not None:
            codes.flag_zeros(raw)
            self._codes, self._result = codes, None

    @staticmethod
    def unpack(signs: ReluSigns) -> Tensor:
        """Unpack hook: the result, or a tensor of its shape that is positive at the same elements."""
        if signs._codes is not None:
            return signs._codes.signs(signs._backend)
        assert signs._result is not None
        return signs._result


class SavedCodes:
    """Pack and unpack hooks of autograd.

    Args:
        book: Says which tensors carry codes.
        backend: For decoding.
    """

    def __init__(self, book: CodeBook, backend: BackendName) -> None:
        self.book, self.backend = book, backend

    def in_force(self) -> bool:
        """Whether these hooks are the innermost now."""
        hooks = saved_tensor_hooks()
        return hooks is not None and hooks[0] == self.pack

    def pack(self, x: Tensor) -> Any:
        """Codes for a cast tensor or a view of one, anything else as it is with its version."""
        codes = self.book.of(x)
        return (x, x._version) if codes is None else _Saved(codes, x)

    def unpack(self, packed: Any) -> Tensor:
        """What was packed.

        Raises:
            RuntimeError: If a saved tensor was overwritten since (hooks switch off autograd's own check).
        """
        if isinstance(packed, _Saved):
            return packed.unpack(self.backend)
        x, version = packed
        if x._version != version:
            raise RuntimeError(
                f"A tensor of shape {tuple(x.shape)} that backward needs has been modified by an in-place operation "
                f"(version {x._version}, expected {version}). Use the out-of-place form of that operation."
            )
        out: Tensor = x
        return out
