"""Where the steps of a sampler are summed: on the grid of the weights, in full precision, or on a grid between."""

from __future__ import annotations

from typing import Literal

from lightning_lpsgld.formats.kinds import FormatLike, NumberFormat
from lightning_lpsgld.formats.parsing import parse_format

__all__ = ["Accumulator", "parse_accumulator"]

#: ``"low"``: the weight is the sum. ``"full"``: float32 beside the weight. A format: on that grid beside the weight.
Accumulator = Literal["low", "full"] | NumberFormat


def parse_accumulator(value: FormatLike, *, owner: str = "") -> Accumulator:
    """``"low"``, ``"full"``, or the format that anything else names.

    Args:
        value: One of the two words, or what :func:`.parse_format` takes.
        owner: Class that was given the argument, for the message.

    Raises:
        ValueError: If a string is neither a word nor the name of a format.
        TypeError: If ``value`` is something else.

    Example:
        >>> parse_accumulator("low"), str(parse_accumulator("mxint16"))
        ('low', 'bfp16b32')
    """
    if isinstance(value, str) and value in ("low", "full"):
        word: Literal["low", "full"] = "low" if value == "low" else "full"
        return word
    try:
        return parse_format(value)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{owner + ': ' if owner else ''}`accumulator` must be 'low', 'full' or a number format such as 'bfp16', "
            f"got {value!r}. {error}"
        ) from error
