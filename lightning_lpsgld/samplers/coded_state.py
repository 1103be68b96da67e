"""Accumulators on a grid as codes: as they are saved, and as they are held beside a weight that is codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lpsgld.formats import NumberFormat, parse_format
from lightning_lpsgld.ops import Encoded, decode, encode
from lightning_lpsgld.ops.code_cell import CodeCell
from lightning_lpsgld.ops.coded import CodedTensor, plain

__all__ = ["begun", "coded", "decoded", "held"]


def begun(param: CodedTensor, fmt: NumberFormat) -> CodedTensor:
    """The accumulator of a weight that is codes, at the values that it had before it was rounded, if they are known.

    Args:
        param: The weight; what it keeps for this is taken.
        fmt: Grid of the accumulator.
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    param.stored()  # rounded, if it is being initialized
    finer, param.cell.finer = param.cell.finer, None
    if finer is None or finer.format != fmt:
        finer = CodeCell(encode(param.decoded().to(wide), fmt))
    return CodedTensor(finer, dtype=wide)


def held(param: Tensor, total: Tensor, fmt: NumberFormat | None) -> Tensor:
    """An accumulator in the form that its weight has: codes beside codes where it lies on its grid, else floats."""
    if not isinstance(param, CodedTensor):
        return plain(total)
    param.cell.finer = None
    if fmt is None or (isinstance(total, CodedTensor) and total.format == fmt):
        return total
    values = plain(total)
    made = CodedTensor.of(values, fmt)
    return made if torch.equal(made.decoded(), values) else values


def coded(state_dict: Mapping[str, Any], formats: Sequence[NumberFormat | None]) -> dict[str, Any]:
    """A saved optimizer state with its accumulators as codes: two bytes each for a grid of 16 bits.

    One that does not lie on its grid (loaded from a run with another, not stepped since), is sharded or holds NaN
    stays as it is.

    Args:
        state_dict: What ``Optimizer.state_dict`` returned; not modified.
        formats: Grid of the accumulator of parameter 0, 1, ...; ``None`` where there is none.

    Returns:
        A copy of the outer layers; ``accumulator`` is a mapping of ``codes``, ``exponents`` and ``format`` (its name).
    """
    state = {}
    for number, entry in state_dict["state"].items():
        fmt, total = formats[number], entry.get("accumulator")
        if fmt is not None and isinstance(total, Tensor):
            entry = {**entry, "accumulator": _coded(total, fmt)}
        state[number] = entry
    return {**state_dict, "state": state}


def _coded(total: Tensor, fmt: NumberFormat) -> Tensor | dict[str, Any]:
    if isinstance(total, CodedTensor):
        encoded = total.encoded()
    elif isinstance(total, DTensor) or not bool(total.isfinite().all()):
        return total
    else:
        encoded = encode(total, fmt)
    if not torch.equal(decode(encoded, total.dtype), total):
        return total
    return {"codes": encoded.codes, "exponents": encoded.exponents, "format": str(fmt), "dtype": str(total.dtype)[6:]}


def decoded(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Accumulators that :func:`coded` saved as coded tensors, whatever the grid was; a state without comes as it is."""
    state = {}
    for number, entry in state_dict["state"].items():
        saved = entry.get("accumulator")
        if isinstance(saved, Mapping):
            encoded = Encoded(saved["codes"], saved["exponents"], parse_format(saved["format"]))
            cell = CodeCell(encoded).copied()  # steps are made in it, and the saved state stays as it is
            entry = {**entry, "accumulator": CodedTensor(cell, dtype=getattr(torch, saved["dtype"]))}
        state[number] = entry
    return {**state_dict, "state": state}
