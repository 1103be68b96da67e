"""Where to cast among functions: which ones count as activations, by name, and one call of such a function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "ACTIVATION_NAMES",
    "OVERWRITING_FUNCTIONS",
    "RANDOM_FUNCTIONS",
    "RELU_FUNCTIONS",
    "SOFTMAX_FUNCTIONS",
    "ActivationFunction",
    "is_inplace",
    "written_by",
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
#: Functions whose result is zero or the input: its codes tell the sign before rounding.
RELU_FUNCTIONS = _functions(("relu",))
#: Functions that make probabilities: of outputs found to be the network's they are taken before the cast, too.
SOFTMAX_FUNCTIONS = _functions(_SOFTMAX_NAMES)
#: Activations that draw from the global generator: never called a second time.
RANDOM_FUNCTIONS = _functions(("rrelu",))


#: Methods that write to their first argument, beside those whose names end in an underscore.
_WRITING = frozenset(
    ["__setitem__"]
    + [f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")]
)


def written_by(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that a call of a function of torch has written to, by its name and by ``out`` and ``inplace``.

    Example:
        >>> x = torch.zeros(1)
        >>> written_by(torch.Tensor.add_, (x, 1), {})[0] is x, written_by(torch.add, (x, 1), {})
        (True, [])
    """
    name = getattr(function, "__name__", "")
    writes = (name.endswith("_") and not name.endswith("__")) or name in _WRITING or bool(kwargs.get("inplace"))
    out = kwargs.get("out")
    found = [args[0] if args else kwargs.get("input")] if writes else []
    found += list(out) if isinstance(out, (tuple, list)) else [out]
    return [x for x in found if isinstance(x, Tensor)]


def is_inplace(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call to an activation function overwrites its argument."""
    if function in OVERWRITING_FUNCTIONS or kwargs.get("inplace"):
        return True
    first = 4 if function in RANDOM_FUNCTIONS else 1  # rrelu has a flag `training` before `inplace`
    return any(value is True for value in args[first:])


@dataclass(frozen=True)
class ActivationFunction:
    """An activation function with everything but its first argument."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        """Call the function on ``x``."""
        out: Tensor = self.func(x, *self.args, **self.kwargs)
        return out

    @property
    def name(self) -> str:
        """Name of the function, without the underscore of an in-place form."""
        return ACTIVATION_NAMES[self.func]

    @property
    def inplace(self) -> bool:
        """Whether the call overwrites its argument."""
        return is_inplace(self.func, (None, *self.args), self.kwargs)

    @property
    def is_relu(self) -> bool:
        """Whether backward asks only for signs."""
        return self.func in RELU_FUNCTIONS

    @property
    def repeatable(self) -> bool:
        """Whether a second call gives the same; else it is never made."""
        return self.func not in RANDOM_FUNCTIONS
