"""Which elements share an exponent: reductions over blocks and their way back."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.formats import BlockFloatingPoint

__all__ = ["block_count", "block_max", "expand_blocks", "exponents_shape"]


def _dim(fmt: BlockFloatingPoint, ndim: int) -> int | None:
    """Block dim as a non-negative index, ``None`` for one whole-tensor block."""
    if fmt.block_dim is None or ndim == 0:
        return None
    if not -ndim <= fmt.block_dim < ndim:
        raise ValueError(f"{fmt}: `block_dim` {fmt.block_dim} does not exist in a tensor of {ndim} dims.")
    return fmt.block_dim % ndim


def exponents_shape(shape: torch.Size | tuple[int, ...], fmt: BlockFloatingPoint) -> tuple[int, ...]:
    """Shape of the compact exponents of a tensor of ``shape``."""
    shape = tuple(shape)
    if fmt.block_size is not None:
        return (*shape[:-1], -(-shape[-1] // fmt.block_size)) if shape else ()
    dim = _dim(fmt, len(shape))
    return () if dim is None else (shape[dim],)


def block_count(shape: torch.Size | tuple[int, ...], fmt: BlockFloatingPoint) -> int:
    """Number of blocks, each with one exponent."""
    count = 1
    for size in exponents_shape(shape, fmt):
        count *= size
    return count


def block_max(x: Tensor, fmt: BlockFloatingPoint, *, fill: float = 0.0) -> Tensor:
    """Maximum over each block in the compact shape; ``fill`` stands for an empty block and pads a short run."""
    if x.numel() == 0:
        return x.new_full(exponents_shape(x.shape, fmt), fill)
    if fmt.block_size is not None and x.ndim:
        pad = -x.shape[-1] % fmt.block_size
        return torch.nn.functional.pad(x, (0, pad), value=fill).unflatten(-1, (-1, fmt.block_size)).amax(-1)
    dim = _dim(fmt, x.ndim)
    if dim is None:
        return x.amax()
    return x.movedim(dim, 0).flatten(1).amax(1) if x.ndim > 1 else x.clone()


def expand_blocks(values: Tensor, shape: torch.Size | tuple[int, ...], fmt: BlockFloatingPoint) -> Tensor:
    """Bring one value per block (compact shape) into a shape that broadcasts against the tensor."""
    shape = tuple(shape)
    if fmt.block_size is not None and shape:
        return values.repeat_interleave(fmt.block_size, dim=-1)[..., : shape[-1]]
    dim = _dim(fmt, len(shape))
    if dim is None:
        return values
    return values.reshape([-1 if i == dim else 1 for i in range(len(shape))])
