"""The sampler's step over many tensors in a few launches.

Tensors are grouped by tile (row length, alignment, dtype); each group is one launch, however many tensors it has. A
program finds its tensor in a table on the device: addresses, row structure, stream and offset of the draws. The table,
the map from programs to tensors and the counts are built once per parameter list; while no address changes, a step
copies nothing to the device, allocates nothing and waits for nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops.carry import carry_seed
from lightning_lpsgld.ops.spec import Accumulation, StepSpec
from lightning_lpsgld.ops.triton_launch import Start
from lightning_lpsgld.ops.triton_layout import (
    LONG_ROW,
    NOTHING,
    ROW,
    Rows,
    Tile,
    facts,
    identity_of,
    is_aligned,
    root_bits,
    rows_of,
    signed64,
    tile_of,
)
from lightning_lpsgld.ops.triton_step_kernel import COLUMNS, step_kernel
from lightning_lpsgld.random import DrawKey, Role, stream_id

__all__ = ["langevin_steps_", "step_meta"]

#: Phases of rows too long for a program: the maxima first, after each how often a row that passes the top is carried,
#: then the step. ``WHOLE``: all in registers.
WHOLE, GRADIENT_MAX, WEIGHT_MAX, GRADIENT_LEVELS, WEIGHT_LEVELS = 0, 1, 2, 3, 4
_KEPT_PLANS = 8
#: Q^vc in floating point takes more registers: beyond this length a program would spill.
_LONGEST_FLOAT_ROW = 4096
#: Rows up to 1024 share three tile widths: fewer launches; the wasted lanes belong to small tensors.
_WIDTHS = (32, 128, 512, 1024)


@dataclass(frozen=True)
class _Item:
    """One tensor of a plan."""

    rows: Rows
    tile: Tile
    aligned: bool
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def group(self) -> tuple[Any, ...]:
        return self.rows.shared, self.tile.rows, self.tile.quads, self.tile.warps, self.aligned, self.dtypes


@dataclass
class _Launch:
    """Tensors that share a compiled kernel."""

    item: _Item
    program_map: Tensor  # int32, (programs, 2): tensor, program within the tensor
    starts: dict[Accumulation, tuple[Start, ...]] = field(default_factory=dict)

    def starts_for(self, spec: StepSpec) -> tuple[Start, ...]:
        """The kernels of all phases; formats are those of the plan."""
        found = self.starts.get(spec.accumulation)
        if found is None:
            meta, pairs = step_meta(spec, self.item), self.program_map
            found = self.starts[spec.accumulation] = tuple(
                Start(step_kernel, len(pairs), pairs.device, {**meta, "PHASE": phase})
                for phase in _phases(spec, self.item)
            )
        return found


@dataclass
class _Plan:
    """What is kept on the device between steps."""

    table: Tensor
    launches: list[_Launch]
    counts: Tensor
    keys: Tensor  # int64, (2, long rows): largest gradient and weight of rows that are reduced beforehand
    structure: list[tuple[int, ...]]
    pointers: tuple[tuple[int, ...], ...] = ()

    def point_to(self, pointers: tuple[tuple[int, ...], ...]) -> None:
        """Bring the table up to date; copies only if an address changed, and never waits."""
        if pointers == self.pointers:
            return
        host = torch.tensor([[*where, *rest] for where, rest in zip(pointers, self.structure)], dtype=torch.int64)
        if self.table.is_cuda:
            host = host.pin_memory()  # the pinned block is reused only after the copy is done
        self.table.copy_(host, non_blocking=True)
        self.pointers = pointers


_plans: OrderedDict[Any, _Plan] = OrderedDict()


def _step_rows(shape: torch.Size, spec: StepSpec) -> Rows:
    formats = (spec.weight_format, spec.gradient_format)
    block = next((fmt for fmt in formats if fmt is not None and fmt.blocks.shared), None)
    rows = rows_of(shape, block)
    assert rows is not None  # refusal() was asked
    own = spec.weight_format is not None and math.isfinite(spec.weight_format.edge)
    if rows.length > _LONGEST_FLOAT_ROW and rows.shared == ROW and own:
        return Rows(LONG_ROW, rows.count, rows.length)
    return rows


def _item(param: Tensor, grad: Tensor, accumulator: Tensor | None, offset: int, spec: StepSpec) -> _Item:
    rows = _step_rows(param.shape, spec)
    tensors = (param, grad) if accumulator is None else (param, grad, accumulator)
    aligned = is_aligned(rows, offset, *tensors)
    width = next((width for width in _WIDTHS if rows.length + (0 if aligned else 3) <= width), None)
    if rows.shared == ROW and width is not None:
        wide = tile_of(Rows(ROW, rows.count, width), True)
    else:
        wide = tile_of(rows, aligned)
    return _Item(rows, wide, aligned, (param.dtype, grad.dtype))


def _build(items: Sequence[_Item], keys: Sequence[DrawKey], indices: Sequence[int], device: torch.device) -> _Plan:
    groups: dict[tuple[Any, ...], list[int]] = {}
    structure: list[tuple[int, ...]] = []
    long_rows = 0
    for number, (item, key, index) in enumerate(zip(items, keys, indices)):
        rows = item.rows
        stream = stream_id(Role.WEIGHT, index)
        structure.append((rows.count, rows.length, stream, key.offset, long_rows, item.tile.chunks))
        long_rows += rows.count if rows.shared == LONG_ROW else 0
        if item.tile.programs:
            groups.setdefault(item.group, []).append(number)
    launches = []
    for members in groups.values():
        programs = torch.tensor([items[number].tile.programs for number in members])
        which = torch.repeat_interleave(torch.tensor(members), programs)
        local = torch.arange(len(which)) - torch.repeat_interleave(programs.cumsum(0) - programs, programs)
        pairs = torch.stack([which, local], dim=1).to(device=device, dtype=torch.int32)
        launches.append(_Launch(items[members[0]], pairs))
    table = torch.empty(len(items), COLUMNS.value, dtype=torch.int64, device=device)
    counts = torch.zeros(len(items), dtype=torch.int64, device=device)
    return _Plan(table, launches, counts, counts.new_zeros(2, long_rows), structure)


def _plan(params: Sequence[Tensor], grads: Sequence[Tensor], accumulators: Sequence[Tensor] | None, spec: StepSpec,
          keys: Sequence[DrawKey], indices: Sequence[int]) -> _Plan:  # fmt: skip
    rest: Sequence[Tensor | None] = [None] * len(params) if accumulators is None else accumulators
    pointers = tuple(
        (param.data_ptr(), grad.data_ptr(), 0 if accumulator is None else accumulator.data_ptr())
        for param, grad, accumulator in zip(params, grads, rest)
    )
    layout = tuple(
        (param.shape, param.dtype, grad.dtype, key.offset, index, any(address % 16 for address in where))
        for param, grad, key, index, where in zip(params, grads, keys, indices, pointers)
    )
    name = (params[0].device, layout, spec.weight_format, spec.gradient_format)
    plan = _plans.pop(name, None)
    if plan is None:
        items = [_item(p, g, a, key.offset, spec) for p, g, a, key in zip(params, grads, rest, keys)]
        plan = _build(items, keys, indices, params[0].device)
    _plans[name] = plan
    while len(_plans) > _KEPT_PLANS:
        _plans.popitem(last=False)
    plan.point_to(pointers)
    return plan


_TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _format_meta(prefix: str, fmt: NumberFormat | None, dtype: torch.dtype, shared: int) -> dict[str, Any]:
    numbers = (
        dict.fromkeys(("KIND", "OFFSET", "LOW", "HIGH", "CMIN", "CMAX", "CARRY"), 0)
        if fmt is None
        else facts(fmt, dtype)
    )
    numbers["SHARED"] = shared if fmt is not None and fmt.blocks.shared else NOTHING
    return {f"{prefix}_{name}": value for name, value in numbers.items()}


def step_meta(spec: StepSpec, item: _Item) -> dict[str, Any]:
    """Compile-time arguments of the kernel for one group of tensors, ``PHASE`` apart."""
    param_dtype, grad_dtype = item.dtypes
    full = spec.accumulation == "full"
    return {
        **_format_meta("W", spec.weight_format, param_dtype, item.rows.shared),
        **_format_meta("G", spec.gradient_format, grad_dtype, item.rows.shared),
        "VC": spec.accumulation == "vc", "FULL": full,
        "DTYPE": _TL_DTYPES[param_dtype], "G_DTYPE": _TL_DTYPES[grad_dtype],
        "T_DTYPE": tl.float32 if full else _TL_DTYPES[param_dtype],
        "SHARED": item.rows.shared, "R": item.tile.rows, "Q": item.tile.quads, "ALIGNED": item.aligned,
        "num_warps": item.tile.warps,
        "enable_fp_fusion": False,  # the drift rounds as the composed step does; polynomials ask for fma by name
    }  # fmt: skip


def _phases(spec: StepSpec, item: _Item) -> list[int]:
    if item.rows.shared != LONG_ROW:
        return [WHOLE]
    phases = _passes(spec.gradient_format, GRADIENT_MAX, GRADIENT_LEVELS)
    return [*phases, *_passes(spec.weight_format, WEIGHT_MAX, WEIGHT_LEVELS), WHOLE]


def _passes(fmt: NumberFormat | None, largest: int, levels: int) -> list[int]:
    if fmt is None or not fmt.blocks.shared:
        return []
    return [largest, levels] if identity_of(fmt, torch.float32).carries else [largest]


def _by_device(params: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    places: dict[torch.device, list[int]] = {}
    for number, param in enumerate(params):
        places.setdefault(param.device, []).append(number)
    return places


def langevin_steps_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    accumulators: Sequence[Tensor] | None,
    spec: StepSpec,
    keys: Sequence[DrawKey],
    indices: Sequence[int],
) -> Tensor:
    """One step of many tensors; arguments as :func:`lightning_lpsgld.samplers.updates.langevin_steps_`.

    Returns:
        Saturated values per tensor, int64 on the device. The buffer is reused: read it before the next step of the
        same parameters.
    """
    places = _by_device(params)
    if len(places) > 1:
        counts = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)
        for members in places.values():
            some = [[x[i] for i in members] for x in (params, grads, accumulators or params, keys, indices)]
            accs = None if accumulators is None else some[2]
            counts[members] = langevin_steps_(some[0], some[1], accs, spec, some[3], some[4]).to(counts.device)  # type: ignore[arg-type]
        return counts
    grads = [grad.contiguous() for grad in grads]
    plan = _plan(params, grads, accumulators, spec, keys, indices)
    plan.counts.zero_()
    seeds = (signed64(keys[0].seed), signed64(carry_seed(keys[0].seed)))
    scalars = (*seeds, keys[0].step, root_bits(spec.noise_variance))
    rates = (float(spec.lr), float(spec.weight_decay))
    if plan.keys.shape[1]:
        plan.keys.zero_()
    largest = plan.keys.unbind()
    for group in plan.launches:
        for start in group.starts_for(spec):
            start(plan.table, group.program_map, plan.counts, *largest, *scalars, *rates)
    return plan.counts
