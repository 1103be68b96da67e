"""What counts as a format: one that is made, or what can be parsed."""

from __future__ import annotations

from typing import Any, Union

from lightning_lpsgld.formats.base import BlockFormat, NumberFormat

__all__ = ["BlockFormat", "FormatLike", "NumberFormat"]

#: What names a format: an object, a string such as ``"bfp8"``, or a QPyTorch number; see :func:`.parse_format`.
FormatLike = Union[NumberFormat, str, Any]
