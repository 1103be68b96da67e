"""What went wrong, in one line with the key of the YAML file that it is about."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning_lpsgld
from lightning_lpsgld.formats import parse_format

__all__ = ["CommandError", "inner_reason", "is_about_values", "key_of", "one_line"]

_PACKAGE = Path(lightning_lpsgld.__file__).parent
_LONGEST = 400


class CommandError(Exception):
    """Something that whoever typed the command can put right: printed in one line, exit code 2."""


def one_line(error: BaseException | str) -> str:
    """A message without line breaks and not longer than a few lines of a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def inner_reason(text: str) -> str:
    """The reason inside jsonargparse's list of everything that a value might have been."""
    text = " ".join(text.split())
    ends = r" - Expected a <class 'NoneType'>| - Not a valid subclass| Given value type|$"
    inner = re.search(rf"Errors: - (.*?)(?:{ends})", text)
    value = re.search(r"Given value: (\S+)$", text)
    if inner and inner.group(1).startswith("Expected") and value:
        return f"{inner.group(1)}, got {value.group(1)!r}"
    return (inner.group(1) if inner else text).strip(" :.")


def _frames(error: BaseException) -> Iterator[Any]:
    step: TracebackType | None = error.__traceback__
    while step is not None:
        yield step.tb_frame
        step = step.tb_next


def is_about_values(error: BaseException) -> bool:
    """Whether a check of this package refused something, rather than something having broken."""
    frames = list(_frames(error))
    if type(error).__name__ == "MisconfigurationException" or isinstance(error, FileNotFoundError):
        return True
    if not frames or not isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError)):
        return False
    return _PACKAGE in Path(frames[-1].f_code.co_filename).resolve().parents


def _plain(value: Any) -> Any:
    return value.as_dict() if hasattr(value, "as_dict") else value


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Key, class name and arguments of everything that a configuration builds."""
    yield "lpsgld", "LowPrecisionSGLD", config.get("lpsgld") or {}
    trainer = config.get("trainer") or {}
    for key in ("model", "data"):
        yield from _described(key, config.get(key))
    for key in ("callbacks", "logger", "plugins", "strategy"):
        values = trainer.get(key)
        for number, value in enumerate(values if isinstance(values, list) else [values]):
            place = f"[{number}]" if isinstance(values, list) else ""
            yield from _described(f"trainer.{key}{place}", value)
    yield "trainer", "Trainer", trainer
    yield "ensemble", "PosteriorEnsemble", config.get("ensemble") or {}


def _described(key: str, value: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        yield f"{key}.init_args", value["class_path"].rsplit(".", 1)[-1], value.get("init_args") or {}


def _argument(message: str, arguments: Mapping[str, Any]) -> str | None:
    """The argument that a message names, or whose value it quotes."""
    for name in re.findall(r"`(\w+)`", message):
        if name in arguments:
            return name
    for name, value in arguments.items():
        if isinstance(value, str) and value and (repr(value) in message or message.startswith(f"{value} ")):
            return name
    return next((name for name in re.findall(r"\b(\w+)=", message) if name in arguments), None)


def _bad_format(name: str, arguments: Mapping[str, Any]) -> str | None:
    """The plugin's argument that is no number format: the format's own message does not know whose it is."""
    if name != "LowPrecisionSGLD":
        return None
    for role in ("weights", "gradients", "activations", "errors"):
        try:
            parse_format(arguments.get(role) or "bfp8")
        except (ValueError, TypeError):
            return role
    return None


def key_of(error: BaseException, config: Any) -> str | None:
    """Key of the configuration that an error is about, as far as its message or its origin tell.

    Args:
        error: What was raised while the configured objects were built or run.
        config: The parsed configuration.

    Returns:
        A key such as ``"lpsgld.weights"``, or ``None``.
    """
    message = str(error)
    origin = {type(frame.f_locals["self"]).__name__ for frame in _frames(error) if "self" in frame.f_locals}
    words = set(re.findall(r"\w+", message[:120]))
    candidates = list(_sections(_plain(config)))
    for chosen in (words, origin):
        for key, name, arguments in candidates:
            if name in chosen and name != "Trainer":
                argument = _argument(message, arguments) or _bad_format(name, arguments)
                base = key.removesuffix(".init_args")
                return base if argument is None else f"{key}.{argument}"
    for key, _, arguments in candidates:
        argument = _argument(message, arguments)
        if argument is not None:
            return f"{key}.{argument}"
    checkpoint = _plain(config).get("ckpt_path")
    return "ckpt_path" if isinstance(checkpoint, str) and checkpoint in message else None
