"""What went wrong, in one line with the key of the YAML file that it is about."""

from __future__ import annotations

import dis
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lightning_lpsgld.bank import BankError
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.predictive.batches import DataError

__all__ = ["CommandError", "as_command_error", "in_one_line", "inner_reason", "key_of", "one_line"]

_LONGEST = 400
_OURS = "lightning_lpsgld"
#: Whose frames are not the user's: what we are called by, and what we call.
_LIBRARIES = {
    _OURS, "torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "jsonargparse", "numpy",
    "safetensors", "fsspec", "onnx", "onnxscript", "onnxruntime", "pyarrow", "yaml", "_pytest", "pytest", "",
} | set(sys.stdlib_module_names)  # fmt: skip
_CHECKPOINTS = ("lightning.fabric.plugins.io", "lightning.pytorch.plugins.io", "torch.serialization")


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


def _steps(error: BaseException) -> Iterator[TracebackType]:
    step: TracebackType | None = error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


def _module(step: TracebackType) -> str:
    return str(step.tb_frame.f_globals.get("__name__", ""))


def _is_raised(step: TracebackType) -> bool:
    """Whether a frame raised by a ``raise``, rather than called something in C that failed."""
    return dis.opname[step.tb_frame.f_code.co_code[step.tb_lasti]] == "RAISE_VARARGS"


def _is_about_values(error: BaseException) -> bool:
    """Whether a check refused something, rather than something having broken, or the user's own code having failed."""
    steps = list(_steps(error))
    if type(error).__name__ == "MisconfigurationException" or isinstance(error, FileNotFoundError):
        return True
    if not steps or not isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError)):
        return False
    tops = [_module(step).partition(".")[0] for step in steps]
    if tops[-1] == _OURS and _is_raised(steps[-1]):
        return True
    return tops[-1] in (_OURS, "lightning") and all(top in _LIBRARIES for top in tops)


def _of_checkpoint(error: BaseException, config: Mapping[str, Any]) -> CommandError | None:
    """What ``ckpt_path`` did: no file that can be read, or a name that means nothing in this run."""
    path = config.get("ckpt_path")
    names = [_module(step) for step in _steps(error)]
    if path is None or any(name.partition(".")[0] not in _LIBRARIES for name in names):
        return None
    reading = any(name.startswith(_CHECKPOINTS) for name in names)
    choosing = bool(names) and names[-1].endswith("checkpoint_connector") and isinstance(error, ValueError)
    if choosing or (reading and isinstance(error, FileNotFoundError)):
        return CommandError(f"ckpt_path: {one_line(error)}")
    if reading:
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        return CommandError(f"ckpt_path: {path} cannot be read as a checkpoint of Lightning ({reason})")
    return None


def _of_data(error: BaseException, config: Mapping[str, Any]) -> CommandError | None:
    """What the configured data say while they are prepared, such as that they are not there."""
    described = config.get("data")
    steps = list(_steps(error))
    if not isinstance(described, Mapping) or not isinstance(error, (RuntimeError, ValueError, OSError)) or not steps:
        return None
    name = str(described.get("class_path")).rpartition(".")[2]
    hooks = [s for s in steps if s.tb_frame.f_code.co_name in ("prepare_data", "setup")]
    own = any(type(s.tb_frame.f_locals.get("self")).__name__ == name for s in hooks)
    return CommandError(f"data: {one_line(error)}") if own and _is_raised(steps[-1]) else None


def as_command_error(error: BaseException, config: Any) -> CommandError | None:
    """The error in one line with its key, if it is about values; ``None``: it keeps its traceback.

    Args:
        error: What was raised while the configured objects were built or run.
        config: The parsed configuration.
    """
    plain = _plain(config)
    known = _of_checkpoint(error, plain) or _of_data(error, plain)
    if known is not None:
        return known
    place = _place_of(error, plain)
    if place is not None:
        return CommandError(f"{place}: {one_line(error)}")
    if not _is_about_values(error):
        return None
    key = key_of(error, plain)
    return CommandError(f"{key}: {one_line(error)}" if key else one_line(error))


@contextmanager
def in_one_line(config: Any) -> Iterator[None]:
    """What a value is refused for becomes one line with its key; what the user's own code raises stays as it is.

    Args:
        config: The parsed configuration.

    Raises:
        CommandError: In place of an error that is about values.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        found = as_command_error(error, config)
        if found is None:
            raise
        raise found from error


# ------------------------------------------------------------------------------------------------------------- the key


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
    yield "", "", {name: value for name, value in config.items() if isinstance(value, (str, int, float))}


def _described(key: str, value: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        yield f"{key}.init_args", value["class_path"].rsplit(".", 1)[-1], value.get("init_args") or {}


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _same_place(named: str, value: str) -> bool:
    """Whether a file that an error names is the one that a value names, in it, or what stands in its way."""
    file, given = os.path.abspath(named), os.path.abspath(value)
    blocks = given.startswith(file + os.sep) and not os.path.isdir(file)
    return file == given or file.startswith(given + os.sep) or blocks


def _place_of(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """The key whose value is the file that the system refused."""
    if not isinstance(error, OSError):
        return None
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
    for key, _, arguments in _sections(config):
        for name, value in arguments.items():
            if isinstance(value, str) and value and any(_same_place(file, value) for file in named):
                return _join(key, name)
    return None


def _argument(message: str, arguments: Mapping[str, Any]) -> str | None:
    """The argument that a message names, or whose value it quotes."""
    for name in re.findall(r"`(\w+)`", message):
        if name in arguments:
            return name
    for name, value in arguments.items():
        if isinstance(value, str) and value and (repr(value) in message or message.startswith(f"{value} ")):
            return name
    words = re.findall(r"\w+(?:[.-]\w+)*", message)
    said = [name for name in re.findall(r"\b(\w+)=", message) if name in arguments]
    said += [name for name in words if name in arguments and str(arguments[name]).lstrip("-") in words]
    return next(iter(said), None)


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


def _said_first(message: str, config: Mapping[str, Any]) -> str | None:
    """The argument that a message begins with, or quotes with its value: `accelerator='toaster'`."""
    first = re.match(r"`(\w+)`", message)
    quoted = dict(re.findall(r"`(?:Trainer\()?(\w+)=['\"]?([^'\"`)]*)", message))
    for key, _, arguments in _sections(config):
        for name, value in arguments.items():
            if (first and name == first[1] and value is not None) or (name in quoted and str(value) == quoted[name]):
                return _join(key, name)
    return None


def _by_class(message: str, names: list[str], config: Mapping[str, Any]) -> str | None:
    """The section of the first of these classes that is configured, and the argument that the message is about."""
    for chosen in names:
        for key, name, arguments in _sections(config):
            if name == chosen and name not in ("Trainer", ""):
                argument = _bad_format(name, arguments) or _argument(message, arguments)
                return key.removesuffix(".init_args") if argument is None else _join(key, argument)
    return None


def key_of(error: BaseException, config: Any) -> str | None:
    """Key of the configuration that an error is about, as far as its message or its origin tell.

    Args:
        error: What was raised while the configured objects were built or run.
        config: The parsed configuration.

    Returns:
        A key such as ``"lpsgld.weights"``, or ``None``.
    """
    message, config = str(error), _plain(config)
    if isinstance(error, DataError):
        return "data"
    steps = list(_steps(error))
    owners = [type(s.tb_frame.f_locals["self"]).__name__ for s in reversed(steps) if "self" in s.tb_frame.f_locals]
    found = (
        _said_first(message, config)
        or _by_class(message, re.findall(r"\w+", message[:120]), config)
        or ("ensemble.bank" if isinstance(error, BankError) and "SampleCollector" not in owners else None)
        or _by_class(message, owners, config)
    )
    return found or _by_argument(message, config)


def _by_argument(message: str, config: Mapping[str, Any]) -> str | None:
    for key, _, arguments in _sections(config):
        argument = _argument(message, arguments)
        if argument is not None:
            return _join(key, argument)
    return None
