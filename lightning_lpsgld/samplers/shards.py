"""Steps on sharded parameters (DTensor, as FSDP2 makes them): the same chain as on one device, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import StepSpec
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.random import DrawKey
from lightning_lpsgld.samplers.updates import langevin_steps_, views_

__all__ = ["all_finite", "apply_to_whole_blocks_", "local_part", "sharded_steps_", "sharded_views_"]

_Tensors = Sequence[Tensor]


def local_part(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def first_index(x: DTensor) -> int | None:
    """Row-major index of the first element of this rank's shard; ``None`` if the shard is not a run of whole rows.

    Raises:
        TypeError: If values are partial sums over ranks.
    """
    if any(placement.is_partial() for placement in x.placements):
        raise TypeError(f"Samplers do not move a parameter whose values are partial sums, got {x.placements}.")
    cut = [(axis, placement) for axis, placement in enumerate(x.placements) if not placement.is_replicate()]
    if not cut:
        return 0
    axis, placement = cut[0]
    if len(cut) > 1 or type(placement) is not Shard or placement.dim != 0:
        return None
    rows, ranks = x.shape[0], x.device_mesh.size(axis)
    start = min(rows, -(-rows // ranks) * x.device_mesh.get_local_rank(axis))
    return start * math.prod(x.shape[1:])


def _offset(x: DTensor, formats: Sequence[NumberFormat | None]) -> int | None:
    """Where this rank's shard begins, if it can be moved by itself; ``None`` if the whole tensor is needed."""
    start = first_index(x)
    across = any(fmt is not None and fmt.blocks.crosses_rows(x.ndim) for fmt in formats)
    return None if across and start is not None and not _whole(x) else start


def _whole(x: DTensor) -> bool:
    return all(placement.is_replicate() for placement in x.placements)


def _gathered(x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim).to_local().clone()


def _write_back(whole: Tensor, x: DTensor) -> None:
    everywhere = [Replicate()] * x.device_mesh.ndim
    parts = DTensor.from_local(whole, x.device_mesh, everywhere, run_check=False).redistribute(placements=x.placements)
    x.to_local().copy_(parts.to_local())


def _placed_like(grad: Tensor, param: DTensor) -> Tensor:
    if isinstance(grad, DTensor) and tuple(grad.placements) != tuple(param.placements):
        return grad.redistribute(placements=param.placements)
    return grad


def apply_to_whole_blocks_(x: Tensor, fmt: NumberFormat, function: Callable[[Tensor], Tensor]) -> None:
    """Replace ``x`` by a function of it that needs whole blocks, such as rounding to nearest; in place."""
    if not isinstance(x, DTensor):
        x.copy_(function(x))
    elif _offset(x, [fmt]) is None:
        _write_back(function(_gathered(x)), x)
    elif x.to_local().numel():
        x.to_local().copy_(function(x.to_local()))


def sharded_steps_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor] | None,
    spec: StepSpec,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
    backend: BackendName = "auto",
) -> Tensor:
    """As :func:`.updates.langevin_steps_`, for tensors of which some may be sharded.

    A shard of whole rows whose blocks lie within rows is moved where it is, with the draws of its elements' indices in
    the whole tensor. Where a block crosses shards (one exponent for the whole tensor, blocks along another dim than 0)
    or a tensor is sharded otherwise than along dim 0, the tensor is gathered, moved as a whole on every rank, and each
    keeps its shard: exact, at the price of one whole tensor of memory and an all-gather of weight and gradient.

    Returns:
        Saturated values per weight, int64; of this rank's shard where it was moved by itself.
    """
    if not any(isinstance(p, DTensor) for p in params):
        return langevin_steps_(params, grads, accumulators, spec, keys, indices, backend)
    formats = [spec.weight_format, spec.gradient_format]

    def move(p: _Tensors, g: _Tensors, a: _Tensors | None, k: Sequence[DrawKey], numbers: Sequence[int]) -> Tensor:
        return langevin_steps_(p, g, a, spec, k, numbers, backend)

    return _moved(params, grads, accumulators, formats, keys, indices, move)


def sharded_views_(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    fmt: NumberFormat,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
    backend: BackendName = "auto",
) -> Tensor:
    """As :func:`.updates.views_`, for tensors of which some may be sharded, sums as their weights; shards as above."""
    if not any(isinstance(p, DTensor) for p in params):
        return views_(params, sums, fmt, keys, indices, backend)

    def move(p: _Tensors, s: _Tensors, _: _Tensors | None, k: Sequence[DrawKey], numbers: Sequence[int]) -> Tensor:
        return views_(p, s, fmt, k, numbers, backend)

    return _moved(params, sums, None, [fmt], keys, indices, move)


def _moved(
    params: _Tensors,
    others: _Tensors,
    totals: _Tensors | None,
    formats: Sequence[NumberFormat | None],
    keys: Sequence[DrawKey],
    indices: Sequence[int],
    move: Callable[[_Tensors, _Tensors, _Tensors | None, Sequence[DrawKey], Sequence[int]], Tensor],
) -> Tensor:
    """Move plain tensors in place of those that are sharded, all in one call, and give each rank its shard back.

    Args:
        params: Weights, of which some are sharded.
        others: What each is moved by: its gradient, or the sum that it is a view of.
        totals: Accumulators, if there are any.
        formats: Those whose blocks must be whole.
        keys: One per weight.
        indices: Number of each weight among the sampler's parameters.
        move: Gets plain tensors, keys with the offsets of their first elements, and numbers; returns counts.

    Returns:
        The counts, of what a rank moved.
    """
    work: list[tuple[Tensor, Tensor, Tensor | None, DrawKey, int]] = []
    back: list[tuple[Tensor, DTensor]] = []
    places: list[int] = []
    rest: Sequence[Tensor | None] = [None] * len(params) if totals is None else totals
    for i, (param, other, total, key) in enumerate(zip(params, others, rest, keys)):
        tensors, offset = _working_set(param, other, total, formats, back)
        if tensors[0].numel():
            places.append(i)
            work.append((*tensors, key.at(offset=key.offset + offset), indices[i]))
    counts = torch.zeros(len(params), dtype=torch.int64, device=local_part(params[0]).device)
    if work:
        p, o, t, k, numbers = (list(column) for column in zip(*work))
        counts[places] = move(p, o, None if totals is None else t, k, numbers).to(counts.device)
    for whole, target in back:
        _write_back(whole, target)
    return counts


def _working_set(
    param: Tensor,
    grad: Tensor,
    total: Tensor | None,
    formats: Sequence[NumberFormat | None],
    back: list[tuple[Tensor, DTensor]],
) -> tuple[tuple[Tensor, Tensor, Tensor | None], int]:
    """Plain tensors to move in place of ``param``, and the index of their first element."""
    if not isinstance(param, DTensor):
        return (param, grad, total), 0
    offset = _offset(param, formats)
    if offset is not None:
        own = None if total is None else local_part(total)
        return (param.to_local(), local_part(_placed_like(grad, param)), own), offset
    whole, whole_total = _gathered(param), None if total is None else _gathered(total)
    back.append((whole, param))
    if isinstance(total, DTensor) and whole_total is not None:
        back.append((whole_total, total))
    return (whole, _gathered(grad), whole_total), 0


def all_finite(flags: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Flags of shards, true only where they are on all ranks, so that all ranks refuse a step or none does."""
    meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
    for mesh in meshes:
        for axis in range(mesh.ndim):
            numbers = flags.to(torch.int32)
            dist.all_reduce(numbers, dist.ReduceOp.MIN, group=mesh.get_group(axis))
            flags = numbers.bool()
    return flags
