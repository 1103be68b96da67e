"""``lpsgld completion bash|zsh``: a script that lets the shell complete commands, actions and options."""

from __future__ import annotations

import argparse

from lightning_lpsgld.cli import bank, trainer
from lightning_lpsgld.cli.parsing import OneLineParser

__all__ = ["EXAMPLE", "SUMMARY", "run", "script"]

#: The command in the list of ``lpsgld --help``.
SUMMARY = "print the completion script of a shell"
#: A call, for its help.
EXAMPLE = 'eval "$(lpsgld completion bash)"'

_OTHERS = ("plan", "bank", "report", "export", "completion")
_FUNCTION = """_lpsgld() {
    local word="${COMP_WORDS[COMP_CWORD]}" place="${COMP_WORDS[1]}"
    [ "$place" = bank ] && place="bank_${COMP_WORDS[2]}"
    [ "$COMP_CWORD" -eq 1 ] && place=""
    [ "$COMP_CWORD" -eq 2 ] && [ "${COMP_WORDS[1]}" = bank ] && place="bank"
    local words=""
    case "$place" in
%s
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [ -n "$place" ] && [ "${word#-}" = "$word" ]; then COMPREPLY+=($(compgen -f -- "$word")); fi
}
complete -o filenames -F _lpsgld lpsgld
"""


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return sorted(o for action in parser._actions for o in action.option_strings if o.startswith("--"))


def _words() -> dict[str, list[str]]:
    """What may come next, by place."""
    words = {"": [*trainer.COMMANDS, *_OTHERS], "bank": list(bank.ACTIONS), "completion": ["bash", "zsh"]}
    words |= {f"bank_{action}": _options(bank.parser(action)) for action in bank.ACTIONS}
    for name, parser in trainer.parsers().items():
        words[name] = _options(parser)
    words["plan"] = sorted({*words["fit"], "--json"})
    words["report"] = sorted({*words["predict"], "--inputs", "--metrics"})
    words["export"] = sorted({*words["predict"], "--inputs", "--max_length"})
    return words


def script(shell: str) -> str:
    """The script for ``"bash"`` or ``"zsh"``."""
    cases = "\n".join(f'        "{place}") words="{" ".join(words)}" ;;' for place, words in _words().items())
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return start + _FUNCTION % cases


def run(args: list[str]) -> int:
    """Print the script.

    Args:
        args: Arguments after ``lpsgld completion``.
    """
    parser = OneLineParser("lpsgld completion", SUMMARY, EXAMPLE)
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(script(parser.parse_args(args).shell), end="")
    return 0
