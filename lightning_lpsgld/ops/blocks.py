"""Which elements share an exponent: reductions over blocks and their way back."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.formats import BlockFormat, MicroscalingFloat, NumberFormat

__all__ = ["block_count", "block_max", "crosses_rows", "expand_blocks", "exponents_shape"]


def _dim(fmt: BlockFormat, ndim: int) -> int | None:
    """Block dim as a non-negative index, ``None`` for one whole-tensor block."""
    if ndim == 0 or isinstance(fmt, MicroscalingFloat) or fmt.block_dim is None:
        return None
    if not -ndim <= fmt.block_dim < ndim:
        raise ValueError(f"{fmt}: `block_dim` {fmt.block_dim} does not exist in a tensor of {ndim} dims.")
    return fmt.block_dim % ndim


def exponents_shape(shape: torch.Size | tuple[int, ...], fmt: BlockFormat) -> tuple[int, ...]:
    """Shape of the compact exponents of a tensor of ``shape``."""
    shape = tuple(shape)
    if fmt.block_size is not None:
        return (*shape[:-1], -(-shape[-1] // fmt.block_size)) if shape else ()
    dim = _dim(fmt, len(shape))
    return () if dim is None else (shape[dim],)


def block_count(shape: torch.Size | tuple[int, ...], fmt: BlockFormat) -> int:
    """Number of blocks, each with one exponent."""
    count = 1
    for size in exponents_shape(shape, fmt):
        count *= size
    return count


def crosses_rows(fmt: NumberFormat | None, ndim: int) -> bool:
    """Whether a block can hold elements with different indices along dim 0."""
    if not isinstance(fmt, BlockFormat):
        return False
    if fmt.block_size is not None:
        return ndim == 1
    return fmt.block_dim is None or fmt.block_dim % ndim != 0


def block_max(x: Tensor, fmt: BlockFormat, *, fill: float = 0.0) -> Tensor:
    """Maximum over each block in the compact shape; ``fill`` stands for an empty block and pads a short run."""
    if x.numel() == 0:
        return x.new_full(exponents_shape(x.shape, fmt), fill)
    if fmt.block_size is not None and x.ndim:
        size = min(fmt.block_size, x.shape[-1])
        pad = -x.shape[-1] % size
        padded = torch.nn.functional.pad(x, (0, pad), value=fill) if pad else x
        return padded.unflatten(-1, (-1, size)).amax(-1)
    dim = _dim(fmt, x.ndim)
    if dim is None:
        return x.amax()
    return x.movedim(dim, 0).flatten(1).amax(1) if x.ndim > 1 else x.clone()


def expand_blocks(values: Tensor, shape: torch.Size | tuple[int, ...], fmt: BlockFormat) -> Tensor:
    """Bring one value per block (compact shape) into a shape that broadcasts against the tensor."""
    shape = tuple(shape)
    if fmt.block_size is not None and shape:
        size = min(fmt.block_size, shape[-1])
        repeated = values.unsqueeze(-1).expand(*values.shape, size)
        return repeated.reshape(*shape[:-1], values.shape[-1] * size)[..., : shape[-1]]
    dim = _dim(fmt, len(shape))
    if dim is None:
        return values
    return values.reshape([-1 if i == dim else 1 for i in range(len(shape))])
