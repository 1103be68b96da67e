"""YAML files of a command, looked at before anything is built: they are there, parse, and are of the right shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lightning_lpsgld.cli.errors import CommandError, one_line

__all__ = ["check_configs"]

_SECTIONS = {"lpsgld": "{weights: bfp8, temperature: 1.0e-3}", "ensemble": "{bank: bank}"}
_EXAMPLE = "`model: {class_path: my.Module}`, `data:`, `lpsgld:`, `trainer:`"


def check_configs(args: Sequence[str]) -> None:
    """Refuse a YAML file that cannot be a configuration; what is in it is for the parser to judge.

    Args:
        args: Arguments of a command.

    Raises:
        CommandError: If a file is no UTF-8 text, no YAML, no mapping, has a key twice, or an empty section.
    """
    for path in _named(args):
        if not path.strip():
            raise CommandError("config: needs the path of a YAML file, got ''.")
        if Path(path).is_file():
            _check(path)


def _named(args: Sequence[str]) -> Iterator[str]:
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c") and equals:
            yield value
        elif name in ("--config", "-c") and place + 1 < len(args):
            yield args[place + 1]


def _check(path: str) -> None:
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (UnicodeDecodeError, OSError) as error:
        raise CommandError(f"config: {path} cannot be read as text in UTF-8: {one_line(error)}") from error
    except yaml.YAMLError as error:
        raise CommandError(f"config: {path} is no YAML: {_where(error)}") from error
    if not isinstance(node, yaml.MappingNode):
        raise CommandError(f"config: {path} must be a mapping with {_EXAMPLE}, and is {_kind(node)}.")
    _refuse_twice(path, node, "")
    for key, value in node.value:
        example = _SECTIONS.get(key.value)
        if example is not None and not isinstance(value, yaml.MappingNode):
            raise CommandError(
                f"{key.value}: must be a mapping such as {example}, and is {_kind(value)} (line "
                f"{key.start_mark.line + 1} of {path}); leave the key out for the defaults."
            )


def _where(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}." if mark is not None and problem else one_line(error)


def _kind(node: yaml.Node | None) -> str:
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return "empty"
    return "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value[:40])


def _refuse_twice(path: str, node: yaml.Node, place: str) -> None:
    """YAML would let the second of two equal keys win, without a word."""
    if isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            _refuse_twice(path, child, f"{place}[{number}]")
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = (f"{place}.{key.value}" if place else key.value), key.start_mark.line + 1
        if key.value in seen:
            raise CommandError(f"{name}: stands twice in {path}, on lines {seen[key.value]} and {line}; keep one.")
        seen[key.value] = line
        _refuse_twice(path, child, name)
