"""What the schema of an operator of torch says of its arguments and results."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

__all__ = ["kind", "written"]


@cache
def kind(func: Any) -> str:
    """``"view"``: its results share the memory of its first argument; ``"in place"``: it writes; else ``""``."""
    schema = func._schema
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments):
        return "in place"
    shares = [result.alias_info is not None for result in schema.returns]
    return "view" if shares and all(shares) else ""


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call that are written to, those within lists too."""
    given = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **kwargs}
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    values = [given.get(name) for name in names]
    return [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
