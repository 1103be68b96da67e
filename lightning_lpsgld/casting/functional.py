"""Activations that are called as functions: which ones, and the torch-function mode that sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "RANDOM_FUNCTIONS",
    "RELU_FUNCTIONS",
    "SOFTMAX_FUNCTIONS",
    "FunctionalMode",
    "is_inplace",
]

_NAMES = (
    *("relu", "relu6", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "elu"),
    *("selu", "celu", "leaky_relu", "prelu", "rrelu", "softplus", "softsign", "logsigmoid", "tanhshrink"),
    *("hardshrink", "softshrink", "threshold", "glu"),
)
_SOFTMAX_NAMES = ("softmax", "log_softmax", "softmin")


def _functions(names: tuple[str, ...]) -> frozenset[Any]:
    """The functions of these names in torch, torch.nn.functional and torch.Tensor, in-place forms included."""
    places = (torch, F, torch.Tensor)
    found = (getattr(place, name + suffix, None) for place in places for name in names for suffix in ("", "_"))
    return frozenset(function for function in found if function is not None)


#: What counts as an activation when it is called as a function; softmax-like ones do not.
ACTIVATION_FUNCTIONS = _functions(_NAMES)
RELU_FUNCTIONS = _functions(("relu",))
SOFTMAX_FUNCTIONS = _functions(_SOFTMAX_NAMES)
#: Activations that draw from the global generator: never called a second time.
RANDOM_FUNCTIONS = _functions(("rrelu",))


def is_inplace(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call to an activation function overwrites its argument."""
    if getattr(function, "__name__", "").endswith("_") or kwargs.get("inplace"):
        return True
    first = 4 if function in RANDOM_FUNCTIONS else 1  # rrelu has a flag `training` before `inplace`
    return any(value is True for value in args[first:])


class FunctionalMode(TorchFunctionMode):
    """Hands calls of activation functions to ``on_activation``, and every other call to ``watch`` while there is one.

    What a library function calls inside (``F.cross_entropy``, attention) is not seen, only the function itself.
    """

    def __init__(self, on_activation: Callable[..., Any], watcher: Callable[[], Callable[..., None] | None]) -> None:
        super().__init__()
        self.on_activation = on_activation
        self.watcher = watcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in ACTIVATION_FUNCTIONS:
            return self.on_activation(func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        watch = self.watcher()
        if watch is not None:
            watch(func, args, kwargs or {}, out)
        return out
