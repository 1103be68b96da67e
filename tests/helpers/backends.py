"""Skipping what a backend declares that it does not take, by its own reason."""

from __future__ import annotations

import pytest
from torch import Tensor

from lightning_lpsgld.formats import FormatLike, parse_format
from lightning_lpsgld.ops.dispatch import choose

__all__ = ["runs"]


def runs(backend: str, op: str, x: Tensor, fmt: FormatLike) -> str:
    """Name of the backend, or a skip with the reason why it does not run ``op`` on ``x``."""
    try:
        choose(backend, op, x, parse_format(fmt))
    except RuntimeError as refusal:
        pytest.skip(f"backend {backend!r}: {refusal}")
    return backend
