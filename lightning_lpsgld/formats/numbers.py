"""Where the formats stood before each had a file of its own: objects that were pickled then name this module."""

from __future__ import annotations

from lightning_lpsgld.formats.block_floating import BlockFloatingPoint
from lightning_lpsgld.formats.fixed import FixedPoint
from lightning_lpsgld.formats.floating import FloatingPoint

__all__ = ["BlockFloatingPoint", "FixedPoint", "FloatingPoint"]
