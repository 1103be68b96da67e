"""Bringing a network's weights onto a grid before the first step: frozen ones stay, and what is lost is said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.samplers.shards import apply_to_whole_blocks_, local_part

__all__ = ["frozen_off_grid", "round_to_nearest_"]

log = logging.getLogger(__name__)


def frozen_off_grid(params: Iterable[Tensor], fmt: NumberFormat) -> set[Tensor]:
    """Those with ``requires_grad=False`` that do not lie on the grid; of sharded ones this rank's part is looked at."""
    frozen = [param for param in params if not param.requires_grad]
    return {param for param in frozen if not _on_grid(local_part(param.detach()), fmt)}


def _on_grid(x: Tensor, fmt: NumberFormat) -> bool:
    return x.numel() == 0 or torch.equal(quantize(x, fmt, rounding="nearest"), x)


def round_to_nearest_(params: Iterable[Tensor], fmt: NumberFormat, name_of: Callable[[Tensor], str]) -> None:
    """Round parameters that are not frozen to nearest, in place; name in the log those of which only zeros are left.

    Args:
        params: Parameters, of which some may be sharded.
        fmt: Their grid.
        name_of: Name of a parameter.
    """
    lost = []
    for param in params:
        if not param.requires_grad:
            continue
        before = bool(local_part(param).any())
        apply_to_whole_blocks_(param, fmt, partial(quantize, fmt=fmt, rounding="nearest"))
        if before and not bool(local_part(param).any()):
            lost.append(name_of(param))
    if lost:
        rest = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        gap = f" of {fmt.gap:g}" if fmt.gap is not None else ""
        log.warning(
            "Rounding to %s left nothing but zeros of %s%s: every weight was smaller than half the gap%s. Take a "
            "format with a finer gap, such as 'bfp8', whose gap follows the weights.",
            fmt, ", ".join(lost[:3]), rest, gap,
        )  # fmt: skip
