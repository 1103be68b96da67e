"""Activations that are called as functions: which ones, and the torch-function mode that sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "ACTIVATION_NAMES",
    "OVERWRITING_FUNCTIONS",
    "RANDOM_FUNCTIONS",
    "RELU_FUNCTIONS",
    "SOFTMAX_FUNCTIONS",
    "ActivationHandler",
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
#: Their names, without the underscore of in-place forms.
ACTIVATION_NAMES: dict[Any, str] = {function: function.__name__.rstrip("_") for function in ACTIVATION_FUNCTIONS}
#: Those of them that overwrite their argument whatever the other arguments.
OVERWRITING_FUNCTIONS = frozenset(function for function in ACTIVATION_FUNCTIONS if function.__name__.endswith("_"))
RELU_FUNCTIONS = _functions(("relu",))
SOFTMAX_FUNCTIONS = _functions(_SOFTMAX_NAMES)
#: Activations that draw from the global generator: never called a second time.
RANDOM_FUNCTIONS = _functions(("rrelu",))


def is_inplace(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call to an activation function overwrites its argument."""
    if function in OVERWRITING_FUNCTIONS or kwargs.get("inplace"):
        return True
    first = 4 if function in RANDOM_FUNCTIONS else 1  # rrelu has a flag `training` before `inplace`
    return any(value is True for value in args[first:])


class ActivationHandler(Protocol):
    """Who is told of the functions that a :class:`FunctionalMode` sees."""

    def on_activation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called instead of an activation function."""

    def watcher(self) -> Callable[..., None] | None:
        """What is to be called after every other function."""


class FunctionalMode(TorchFunctionMode):
    """Hands calls of activation functions to a handler, and every other call to its watcher while there is one.

    What a library function calls inside (``F.cross_entropy``, attention) is not seen, only the function itself.
    """

    def __init__(self, handler: ActivationHandler) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in ACTIVATION_FUNCTIONS:
            return self.handler.on_activation(func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        watch = self.handler.watcher()
        if watch is not None:
            watch(func, args, kwargs or {}, out)
        return out
