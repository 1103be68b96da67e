"""Which elements share an exponent: layouts of blocks, reductions over them and the way back.

A layout is asked, never looked into: a format with blocks of its own shape brings a subclass of :class:`Blocks`, and
what runs on contiguous memory (fused kernels) sees by :meth:`Blocks.run_length` whether it can take it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ALONE", "Along", "Blocks", "Runs", "Whole"]

Shape = torch.Size | tuple[int, ...]


class Blocks:
    """The layout in which every element stands alone, and what every layout answers.

    Attributes:
        shared: Whether there are exponents that elements share.
        by_sample: Whether every block is an index of dim 0, or all there is, in a tensor of any number of dims.
        any_order: Whether within an index of dim 0 the order of the elements does not matter to the blocks, so that
            memory may be channels-last.

    Example:
        >>> Along(0).compact((6, 4)), Runs(3).compact((6, 4)), Whole().compact((6, 4)), ALONE.count((6, 4))
        ((6,), (6, 2), (), 0)
    """

    shared = False
    by_sample = False
    any_order = True

    def compact(self, shape: Shape) -> tuple[int, ...]:
        """Shape of the exponents of a tensor of ``shape``, one a block; ``(0,)`` where nothing is shared."""
        return (0,)

    def count(self, shape: Shape) -> int:
        """Number of exponents of a tensor of ``shape``."""
        return math.prod(self.compact(shape))

    def max(self, x: Tensor, *, fill: float = 0.0) -> Tensor:
        """Maximum over each block, compact shape; ``fill`` stands for an empty block and pads a short one.

        Where nothing is shared, ``x`` itself.
        """
        return x

    def expand(self, values: Tensor, shape: Shape) -> Tensor:
        """One value a block (compact shape), brought into a shape that broadcasts against a tensor of ``shape``."""
        return values

    def crosses_rows(self, ndim: int) -> bool:
        """Whether a block can hold elements with different indices along dim 0 of a tensor of ``ndim`` dims."""
        return False

    def run_length(self, shape: Shape) -> int | None:
        """Elements of a block if each is one run of row-major memory, all of one length; ``None`` if not.

        Where nothing is shared, 0. What is not overridden says ``None``: no fused kernel takes it for rows.
        """
        return None if self.shared else 0


class Whole(Blocks):
    """One block for the tensor."""

    shared = True
    by_sample = True

    def compact(self, shape: Shape) -> tuple[int, ...]:
        """``()``."""
        return ()

    def max(self, x: Tensor, *, fill: float = 0.0) -> Tensor:
        """As :meth:`Blocks.max`."""
        return x.amax() if x.numel() else x.new_full((), fill)

    def crosses_rows(self, ndim: int) -> bool:
        """Always."""
        return True

    def run_length(self, shape: Shape) -> int | None:
        """All elements."""
        return math.prod(shape)


class Along(Blocks):
    """A block per index of one dim; of a 0-d tensor one block.

    Args:
        dim: Which; negative ones count from the last.

    Raises:
        ValueError: By all methods, if the tensor has no such dim.
    """

    shared = True

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @property
    def by_sample(self) -> bool:  # type: ignore[override]
        """Of dim 0, counted from the front."""
        return self.dim == 0

    def _at(self, ndim: int) -> int | None:
        if ndim == 0:
            return None
        if not -ndim <= self.dim < ndim:
            raise ValueError(
                f"Blocks along dim {self.dim}: `block_dim` {self.dim} does not exist in a tensor of {ndim} dims."
            )
        return self.dim % ndim

    def compact(self, shape: Shape) -> tuple[int, ...]:
        """``(shape[dim],)``."""
        at = self._at(len(shape))
        return () if at is None else (shape[at],)

    def max(self, x: Tensor, *, fill: float = 0.0) -> Tensor:
        """As :meth:`Blocks.max`."""
        if x.numel() == 0:
            return x.new_full(self.compact(x.shape), fill)
        at = self._at(x.ndim)
        if at is None:
            return x.amax()
        return x.movedim(at, 0).flatten(1).amax(1) if x.ndim > 1 else x.clone()

    def expand(self, values: Tensor, shape: Shape) -> Tensor:
        """As :meth:`Blocks.expand`."""
        at = self._at(len(shape))
        return values if at is None else values.reshape([-1 if i == at else 1 for i in range(len(shape))])

    def crosses_rows(self, ndim: int) -> bool:
        """Of any dim but the first."""
        return ndim > 0 and self.dim % ndim != 0

    def run_length(self, shape: Shape) -> int | None:
        """Elements of a row, for blocks along dim 0."""
        if not shape:
            return 1
        return math.prod(shape) // max(shape[0], 1) if self.dim in (0, -len(shape)) else None


class Runs(Blocks):
    """Runs of ``size`` elements along the last dim, the last of a row shorter; of a 0-d tensor one block."""

    shared = True
    any_order = False

    def __init__(self, size: int) -> None:
        self.size = size

    def compact(self, shape: Shape) -> tuple[int, ...]:
        """``(*shape[:-1], runs)``."""
        return (*shape[:-1], -(-shape[-1] // self.size)) if len(shape) else ()

    def max(self, x: Tensor, *, fill: float = 0.0) -> Tensor:
        """As :meth:`Blocks.max`."""
        if x.numel() == 0:
            return x.new_full(self.compact(x.shape), fill)
        if not x.ndim:
            return x.amax()
        size = min(self.size, x.shape[-1])
        pad = -x.shape[-1] % size
        padded = torch.nn.functional.pad(x, (0, pad), value=fill) if pad else x
        return padded.unflatten(-1, (-1, size)).amax(-1)

    def expand(self, values: Tensor, shape: Shape) -> Tensor:
        """As :meth:`Blocks.expand`."""
        if not len(shape):
            return values
        size = min(self.size, shape[-1])
        repeated = values.unsqueeze(-1).expand(*values.shape, size)
        return repeated.reshape(*shape[:-1], values.shape[-1] * size)[..., : shape[-1]]

    def crosses_rows(self, ndim: int) -> bool:
        """Of a tensor of one dim."""
        return ndim == 1

    def run_length(self, shape: Shape) -> int | None:
        """``size`` (a whole row if that is shorter), where it divides a row."""
        if not len(shape):
            return 1
        size = min(self.size, shape[-1])
        return size if size == 0 or shape[-1] % size == 0 else None


#: Every element stands alone.
ALONE = Blocks()
