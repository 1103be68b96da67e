"""The weights that a run begins with: of a checkpoint, and there at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

__all__ = ["load_weights", "read_parameters", "read_tensors", "refuse_lazy"]

#: Where files keep a ``state_dict`` beside other things.
_ENTRIES = ("state_dict", "model_state_dict", "model")


def load_weights(module: Module, path: str | os.PathLike[str]) -> str:
    """Load the weights of a checkpoint, bit for bit, and nothing else of it.

    Args:
        module: The module; overwritten.
        path: File of a Lightning checkpoint, of a plain ``state_dict`` (of the module, or of one submodule whose names
            then lack a prefix), or a safetensors file.

    Returns:
        What was found, for display.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If its tensors are not the module's; the message names some that are missing or unexpected.
    """
    content = _read(path, "start_from")
    weights = _tensors(content)
    wanted = module.state_dict()
    prefixes = ["", *(f"{name}." for name, _ in module.named_children())]
    prefix = next((p for p in prefixes if {p + name for name in weights} == set(wanted)), "")
    weights = {prefix + name: value for name, value in weights.items()}
    missing, unexpected = sorted(wanted.keys() - weights), sorted(weights.keys() - wanted)
    other = [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    if missing or unexpected or other:
        raise ValueError(
            f"start_from={os.fspath(path)!r} is not a checkpoint of a {type(module).__name__}: missing "
            f"{_some(missing)}; unexpected {_some(unexpected)}; of another shape {_some(other)}. Load what fits into "
            "the module yourself before `fit`, and leave `start_from` out."
        )
    module.load_state_dict(weights)
    steps = f" after step {content['global_step']}" if "global_step" in content else ""
    dropped = "; its optimizer state is not used" if content.get("optimizer_states") or content.get("optimizer") else ""
    return f"weights of {os.fspath(path)}{steps}{dropped}"


def read_tensors(path: str | os.PathLike[str], argument: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint by the module's names.

    Args:
        path: As for :func:`load_weights`.
        argument: Name of the argument that gave the path, for messages.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is none of these.
    """
    return _tensors(_read(path, argument))


def read_parameters(
    module: Module, names: Sequence[str], path: str | os.PathLike[str], argument: str
) -> dict[str, Tensor]:
    """Tensors of a checkpoint for some parameters of a module; what else it holds does not matter.

    Args:
        module: The module; not changed.
        names: Of its parameters.
        path: As for :func:`load_weights`.
        argument: Name of the argument that gave the path, for messages.

    Returns:
        Name -> tensor, in the parameter's dtype and on its device.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If one is missing, of another shape, or not finite.
    """
    weights = _tensors(_read(path, argument))
    prefixes = ["", *(f"{name}." for name, _ in module.named_children())]
    prefix = max(prefixes, key=lambda p: sum(name.startswith(p) and name[len(p) :] in weights for name in names))
    found, wrong = {}, []
    for name in names:
        param, value = module.get_parameter(name), weights.get(name[len(prefix) :])
        fits = name.startswith(prefix) and value is not None and value.shape == param.shape
        if fits and value is not None and bool(value.isfinite().all()):
            found[name] = value.detach().to(param.device, param.dtype, copy=True)
        else:
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"{argument}={os.fspath(path)!r} has no finite tensor of the right shape for {_some(wrong)} of "
            f"{type(module).__name__}. Give a checkpoint of this module, or sample less (`sampled`)."
        )
    return found


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of what a file held, by the module's names, wrappers' prefixes removed."""
    entry = next((name for name in _ENTRIES if isinstance(content.get(name), Mapping)), None)
    found = content if entry is None else content[entry]
    return {_unwrapped(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _read(path: str | os.PathLike[str], argument: str) -> Mapping[str, Any]:
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{argument}={os.fspath(path)!r} cannot be read as plain weights: {error} If you trust the file, load it "
            "with torch.load(weights_only=False) and save its `state_dict` alone."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{argument}={os.fspath(path)!r} holds a {type(content).__name__}, not a `state_dict`.")
    return content


def _unwrapped(name: str) -> str:
    return name.removeprefix("module.").replace("_orig_mod.", "")  # of DDP and of torch.compile


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def refuse_lazy(module: Module) -> None:
    """Refuse a module whose shapes are not known yet.

    Raises:
        RuntimeError: If a lazy module has not run.
    """
    names = [
        name
        for name, child in module.named_modules()
        if any(is_lazy(t) for t in (*child.parameters(recurse=False), *child.buffers(recurse=False)))
    ]
    if names:
        kind = type(module.get_submodule(names[0])).__name__
        raise RuntimeError(
            f"LowPrecisionSGLD: {kind} {names[0]!r} is lazy and has not run, so its weights have no shape yet "
            f"({len(names)} such module(s)). Run one batch through the module before `fit`, or in its `setup`: "
            "self(example)."
        )
