"""What jsonargparse refuses, in one line that begins with the key and says what is accepted."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Sequence

from lightning_lpsgld.cli.errors import inner_reason, one_line

__all__ = ["parse_message"]

#: Sections whose arguments are those of a class.
_CLASSES = {
    "lpsgld": "lightning_lpsgld.LowPrecisionSGLD",
    "ensemble": "lightning_lpsgld.cli.trainer.EnsembleOptions",
    "trainer": "lightning.pytorch.Trainer",
}


def parse_message(error: Exception, commands: Sequence[str]) -> str:
    """One line that begins with the key of the value that was refused.

    Args:
        error: What jsonargparse raised.
        commands: Names that a key may begin with when there are subcommands.
    """
    text = " ".join(str(error).split())
    command = rf"(?:{'|'.join(commands)})\."
    needed = re.search(rf"arguments are required: (?:{command})?([\w.]+)", text)
    if needed:
        return f"{needed[1]}: is needed, e.g. `{needed[1]}: {{class_path: my.Module}}` in the file of --config."
    unknown = re.search(r"""(?:(\w+) ["'`]([\w.]+)["'`] )?does not accept option ["'`]([\w.]+)["'`]""", text)
    if unknown:
        group = f"{unknown[2]}." if unknown[1] == "Group" else ""
        return _no_option(f"{group}{unknown[3].removeprefix(group)}")
    found = re.search(r"""(?:Parser key|[Kk]ey|Option|Group)\s+["'`]([\w.\[\]]+)["'`]""", text)
    if not found:
        return one_line(text)
    key = re.sub(rf"^{command}", "", found.group(1))
    rest = text[: found.start()] + text[found.end() :]
    if re.fullmatch(r"\W*(?:Validation failed: )?\W*is not accepted\W*", rest.strip()):
        return _no_option(key)
    return one_line(_in_class(key, rest) or f"{key}: {inner_reason(rest)}")


def _no_option(key: str) -> str:
    section, _, name = key.partition(".")
    return f"{key}: there is no such option.{_meant(_CLASSES.get(section), name)}"


def _in_class(key: str, text: str) -> str | None:
    """About an argument of a class that a value names."""
    place = re.search(r"Problem with given class_path '([\w.]+)': (.*)", text)
    if place is None:
        return None
    path, what = place[1], place[2]
    name = path.rpartition(".")[2]
    option = re.match(r"Option '([\w.]+)' is not accepted", what)
    if option and path in ("lightning.LightningModule", "lightning.LightningDataModule", "lightning.Callback"):
        return f"{key}.{option[1]}: needs a `class_path` beside it, and takes its arguments under `init_args`."
    if option:
        return f"{key}.init_args.{option[1]}: {name} has no such argument.{_meant(path, option[1])}"
    value = re.match(r"""Parser key ["']([\w.]+)["']: (.*)""", what)
    if value is None:
        return None
    return f"{key}.init_args.{value[1]}: {_accepted(value[2])} (an argument of {name})"


def _accepted(text: str) -> str:
    """Jsonargparse's list of types, without repeating itself."""
    value = re.search(r"(?:Given value|Got value): (.+?)(?: Errors:|$)", text)
    kinds = list(dict.fromkeys(re.findall(r"Expected a (<class '[\w.]+'>|typing\.Literal\[[^]]*\])", text)))
    if not kinds:
        return inner_reason(text)
    return f"Expected a {' or '.join(kinds)}" + (f", got {value[1].strip()!r}" if value else "")


def _meant(path: str | None, name: str) -> str:
    """The argument that was meant, if one is spelled alike."""
    if path is None:
        return ""
    module, _, member = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), member)
        known = {
            parameter
            for base in inspect.getmro(made)
            for parameter in inspect.signature(base).parameters
            if parameter not in ("self", "args", "kwargs")
        }
    except (ImportError, AttributeError, TypeError, ValueError):
        return ""
    alike = difflib.get_close_matches(name.rpartition(".")[2], sorted(known), n=1)
    return f" Did you mean `{alike[0]}`?" if alike else f" There are: {', '.join(sorted(known))}."
