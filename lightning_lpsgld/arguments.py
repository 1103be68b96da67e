"""Rules for arguments and for values that others set later, each with one message: name, rule, value, remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = ["require_choice", "require_count", "require_flag", "require_int", "require_number", "require_seed"]


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_number(
    name: str, value: Any, *, above: float | None = None, below: float = math.inf, owner: str = "", remedy: str = ""
) -> float:
    """The value as a float, if it is a finite number in range.

    Args:
        name: How the caller calls it.
        value: A real number (of NumPy, too) or a tensor of one element; neither bool nor string.
        above: Exclusive lower limit; ``None``: 0, inclusive.
        below: Exclusive upper limit.
        owner: Class that is meant, put before the message.
        remedy: A sentence put after it.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is NaN, infinite or out of range.

    Example:
        >>> require_number("lr", 0.1)
        0.1
        >>> require_number("temperature", "1", owner="SGLD")
        Traceback (most recent call last):
        TypeError: SGLD: `temperature` must be a number, got '1'.
    """
    start, end = f"{owner}: " if owner else "", f" {remedy}" if remedy else ""
    real = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())
    if not real or isinstance(value, bool):
        raise TypeError(f"{start}`{name}` must be a number, got {value!r}.{end}")
    found = float(value)
    if not (math.isfinite(found) and (found >= 0 if above is None else found > above) and found < below):
        rule = " and >= 0" if above is None else "" if above == -math.inf else f" and > {above:g}"
        limit = "" if below == math.inf else f" and < {below:g}"
        raise ValueError(f"{start}`{name}` must be finite{rule}{limit}, got {found}.{end}")
    return found


def require_int(name: str, value: Any, *, owner: str = "") -> int:
    """The value as an int, if it is one (of NumPy, too); neither bool nor a float with an integral value.

    Raises:
        TypeError: If it is not.

    Example:
        >>> require_int("sampling_steps", 3)
        3
    """
    if not _is_int(value):
        raise TypeError(f"{f'{owner}: ' if owner else ''}`{name}` must be an int, got {value!r}.")
    return int(value)


def require_count(
    name: str, value: Any, *, low: int = 1, high: int | None = None, owner: str = "", unit: str = "", remedy: str = ""
) -> int:
    """The value as an int, if it is one in [low, high].

    Args:
        name: How the caller calls it.
        value: An int (of NumPy, too); neither bool nor a float with an integral value.
        low: Inclusive lower limit.
        high: Inclusive upper limit, if any.
        owner: Class that is meant.
        unit: What is counted, for the message.
        remedy: A sentence put after the message.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is out of range.

    Example:
        >>> require_count("cycles", 7)
        7
        >>> require_count("cycles", "3")
        Traceback (most recent call last):
        TypeError: `cycles` must be an int >= 1, got '3'.
    """
    rule = f">= {low}" if high is None else f"in [{low}, {high}]"
    message = f"{owner}: " if owner else ""
    message += f"`{name}` must be an int {rule}{f' ({unit})' if unit else ''}, got {value!r}."
    message += f" {remedy}" if remedy else ""
    if not _is_int(value):
        raise TypeError(message)
    if value < low or (high is not None and value > high):
        raise ValueError(message)
    return int(value)


def require_seed(name: str, value: Any, *, owner: str = "") -> int:
    """The value as an int, if it is one that Philox has a key for: two seeds that are not equal draw differently.

    Args:
        name: How the caller calls it.
        value: An int in [0, 2**64).
        owner: Class that is meant.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is out of range.

    Example:
        >>> require_seed("seed", 7)
        7
        >>> require_seed("seed", 1.5)
        Traceback (most recent call last):
        TypeError: `seed` must be an int in [0, 2**64), got 1.5.
    """
    message = f"{owner}: " if owner else ""
    message += f"`{name}` must be an int in [0, 2**64), got {value!r}."
    if not _is_int(value):
        raise TypeError(message)
    if not 0 <= value < 2**64:
        raise ValueError(message + " Fold a larger or negative one with `seed % 2**64`.")
    return int(value)


def require_choice(name: str, value: Any, allowed: Sequence[Any], *, owner: str = "", remedy: str = "") -> None:
    """Refuse what is not one of the allowed values.

    Raises:
        ValueError: With all of them named.

    Example:
        >>> require_choice("accumulator", "low", ("low", "full"))
    """
    if not any(type(value) is type(one) and value == one for one in allowed):
        start, end = f"{owner}: " if owner else "", f" {remedy}" if remedy else ""
        names = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
        raise ValueError(f"{start}`{name}` must be {names}, got {value!r}.{end}")


def require_flag(name: str, value: Any, *, owner: str = "") -> bool:
    """The value, if it is a bool.

    Raises:
        TypeError: If it is not: ``"false"`` is true to Python.

    Example:
        >>> require_flag("variance_corrected", True)
        True
    """
    if not isinstance(value, bool):
        raise TypeError(f"{f'{owner}: ' if owner else ''}`{name}` must be True or False, got {value!r}.")
    return value
