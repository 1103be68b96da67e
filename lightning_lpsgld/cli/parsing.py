"""Argument parsers of our own commands: one line for an error, an example in the help."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any, NoReturn

from lightning_lpsgld.cli.errors import CommandError

__all__ = ["OneLineParser", "as_json"]


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises :class:`.CommandError` where argparse prints its usage and exits.

    Args:
        prog: Name of the command.
        description: What it does.
        example: Shown at the end of the help.
    """

    def __init__(self, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise CommandError(f"{message} (see `{self.prog} --help`)")


def as_json(data: Any) -> str:
    """JSON text of plain data; numbers that JSON does not have become strings."""
    return json.dumps(_plain(data), indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
