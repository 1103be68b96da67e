"""Accumulators on a grid as they are saved: integer codes and shared exponents, where those give the same bits back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lpsgld.formats import NumberFormat, parse_format
from lightning_lpsgld.ops import Encoded, decode, encode

__all__ = ["coded", "decoded"]


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
    if isinstance(total, DTensor) or not bool(total.isfinite().all()):
        return total
    encoded = encode(total, fmt)
    if not torch.equal(decode(encoded, total.dtype), total):
        return total
    return {"codes": encoded.codes, "exponents": encoded.exponents, "format": str(fmt), "dtype": str(total.dtype)[6:]}


def decoded(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`coded`, whatever the grid was; a state without codes comes back as it is."""
    state = {}
    for number, entry in state_dict["state"].items():
        saved = entry.get("accumulator")
        if isinstance(saved, Mapping):
            encoded = Encoded(saved["codes"], saved["exponents"], parse_format(saved["format"]))
            entry = {**entry, "accumulator": decode(encoded, getattr(torch, saved["dtype"]))}
        state[number] = entry
    return {**state_dict, "state": state}
