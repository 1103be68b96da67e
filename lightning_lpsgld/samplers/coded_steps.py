"""Steps of weights held as codes: decoded, moved and encoded a few rows at a time, the same chain bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import StepSpec
from lightning_lpsgld.ops.coded import CodedTensor
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.random import DrawKey
from lightning_lpsgld.samplers.shards import sharded_steps_, sharded_views_
from lightning_lpsgld.samplers.updates import langevin_steps_, views_

__all__ = ["stored_steps_", "stored_views_"]


def stored_steps_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor] | None,
    spec: StepSpec,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
    backend: BackendName = "auto",
) -> Tensor:
    """As :func:`.updates.langevin_steps_`, for weights of which some may be sharded, or all codes.

    A run of whole rows whose blocks lie within rows is decoded, moved with the draws of its elements' indices in the
    whole weight, and encoded, which is exact; where a block crosses rows the weight is moved as a whole.

    Returns:
        Saturated values per weight, int64.
    """
    if not any(isinstance(param, CodedTensor) for param in params):
        return sharded_steps_(params, grads, accumulators, spec, keys, indices, backend)
    counts = [
        _coded_step_(param, grad, spec, key, index, backend)
        if isinstance(param, CodedTensor)
        else langevin_steps_([param], [grad], None, spec, [key], [index], backend)[0]
        for param, grad, key, index in zip(params, grads, keys, indices)
    ]
    return torch.stack(counts)


def _coded_step_(
    param: CodedTensor, grad: Tensor, spec: StepSpec, key: DrawKey, index: int, backend: BackendName
) -> Tensor:
    cell = param.cell
    count = torch.zeros((), dtype=torch.int64, device=param.device)
    if not param.numel():
        return count
    runs = cell.runs(spec.weight_format, spec.gradient_format)
    whole = len(runs) == 1 or isinstance(spec.gradient_std, Tensor)
    if whole:
        values = cell.values(param.dtype)
        count = langevin_steps_([values], [grad], None, spec, [key], [index], backend)[0]
        cell.set(values)
    else:
        row = param[0].numel()
        for start, stop in runs:
            values = cell.values(param.dtype, start, stop)
            place = key.at(offset=key.offset + start * row)
            part = [grad[start:stop]]
            count = count + langevin_steps_([values], part, None, spec, [place], [index], backend)[0]
            cell.set(values, start, stop)
    torch.autograd.graph.increment_version(param)
    return count


def stored_views_(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    fmt: NumberFormat,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
    backend: BackendName = "auto",
) -> Tensor:
    """As :func:`.updates.views_`, for weights of which some may be sharded, or all codes; their sums then are, too.

    Returns:
        Sums outside the range of the weight's grid per weight, int64.
    """
    if not any(isinstance(param, CodedTensor) for param in params):
        return sharded_views_(params, sums, fmt, keys, indices, backend)
    counts = [
        _coded_view_(param, total, fmt, key, index, backend)
        if isinstance(param, CodedTensor)
        else views_([param], [total], fmt, [key], [index], backend)[0]
        for param, total, key, index in zip(params, sums, keys, indices)
    ]
    return torch.stack(counts)


def _coded_view_(
    param: CodedTensor, total: Tensor, fmt: NumberFormat, key: DrawKey, index: int, backend: BackendName
) -> Tensor:
    cell, count = param.cell, torch.zeros((), dtype=torch.int64, device=param.device)
    if not param.numel():
        return count
    whole = [(0, param.shape[0] if param.ndim else 1)]
    runs = cell.runs(total.format, beside=total.cell) if isinstance(total, CodedTensor) else whole
    for start, stop in runs:
        part = (start, stop) if len(runs) > 1 else ()
        found = total.cell.values(total.dtype, *part) if isinstance(total, CodedTensor) else total
        values = torch.empty_like(found, dtype=param.dtype)
        place = key.at(offset=key.offset + start * cell.stored.row)
        count = count + views_([values], [found], fmt, [place], [index], backend)[0]
        cell.set(values, *part)
    torch.autograd.graph.increment_version(param)
    return count
