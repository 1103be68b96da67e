"""Which command was meant, and how it ends: 0, or 2 with one line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from lightning_lpsgld.cli import bank, completion, export, plan, report, trainer
from lightning_lpsgld.cli.errors import CommandError, one_line

__all__ = ["main"]

#: Command -> (what it does, an example, what runs it with the arguments after it).
OTHERS: dict[str, tuple[str, str, Callable[[list[str]], int]]] = {
    "plan": (plan.SUMMARY, plan.EXAMPLE, plan.run),
    "bank": (bank.SUMMARY, bank.EXAMPLE, bank.run),
    "report": (report.SUMMARY, report.EXAMPLE, report.run),
    "export": (export.SUMMARY, export.EXAMPLE, export.run),
    "completion": (completion.SUMMARY, completion.EXAMPLE, completion.run),
}


def _help() -> str:
    rows = [(name, text, example) for name, (text, example) in trainer.COMMANDS.items()]
    rows += [(name, text, example) for name, (text, example, _) in OTHERS.items()]
    lines = [
        "usage: lpsgld COMMAND ...",
        "",
        "Low-precision SGLD: train, look into the samples, predict.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<11} {text}" for name, text, _ in rows]
    lines += ["", "examples:", *(f"  {example}" for _, _, example in rows), ""]
    lines += ["`lpsgld COMMAND --help` says more; `lpsgld --version` prints the version."]
    return "\n".join(lines)


def main(args: Sequence[str] | dict[str, Any] | None = None) -> None:
    """Entry point of the ``lpsgld`` command.

    Args:
        args: Arguments, the command first; ``None``: those of the process. A mapping goes to LightningCLI as it is.

    Raises:
        SystemExit: With 2 and one line on stderr, if a value is refused or a command is unknown; with 1 if a check
            (``bank verify``) failed. Errors of the user's own code are raised as they are.
    """
    if isinstance(args, dict):
        trainer.run(args)
        return
    given = list(sys.argv[1:] if args is None else args)
    if args is None and "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # classes of the folder where the command is typed, as `python -m` finds them
    command = given[0] if given else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return
    if command == "--version":
        print(f"lpsgld {version('lightning_lpsgld')}")
        return
    try:
        code = _run(command, given, args is None)
    except CommandError as error:
        print(f"lpsgld {command}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    if code:
        raise SystemExit(code)


def _run(command: str, given: list[str], own: bool) -> int:
    if command in OTHERS:
        return OTHERS[command][2](given[1:])
    if command in trainer.COMMANDS or command.startswith("-"):
        trainer.run(None if own else given)
        return 0
    raise CommandError(f"there is no such command; use {', '.join([*trainer.COMMANDS, *OTHERS])}.")
