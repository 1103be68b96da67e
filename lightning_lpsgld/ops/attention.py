"""Attention's products, each seen by itself: torch's own function of attention without the door that hides them.

``multi_head_attention_forward`` hands itself to a torch-function mode as one call, and asks again whenever it is called
within one. A copy of it (and of the helpers that project) in which nobody asks runs the same lines, and every product
in them reaches the mode on its own.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import torch.nn.functional as F

__all__ = ["opened_attention"]

#: The function and the helpers in which it projects.
_NAMES = ("multi_head_attention_forward", "_in_projection_packed", "_in_projection")


def _nobody_asks(tensors: Any) -> bool:
    return False


@cache
def opened_attention() -> Any:
    """``torch.nn.functional.multi_head_attention_forward`` whose products reach torch-function modes one by one.

    Returns:
        The function; ``None`` where torch's is no Python function.

    Example:
        >>> import torch
        >>> attention = torch.nn.MultiheadAttention(4, 2)
        >>> x, seen = torch.ones(3, 1, 4), []
        >>> class Mode(torch.overrides.TorchFunctionMode):
        ...     def __torch_function__(self, func, types, args=(), kwargs=None):
        ...         seen.append(func)
        ...         if func is F.multi_head_attention_forward:
        ...             with self:
        ...                 return opened_attention()(*args, **(kwargs or {}))
        ...         return func(*args, **(kwargs or {}))
        >>> with Mode():
        ...     out = attention(x, x, x)[0]
        >>> seen.count(F.linear), torch.equal(out, attention(x, x, x)[0])
        (2, True)
    """
    found = {name: getattr(F, name, None) for name in _NAMES}
    if not all(isinstance(function, FunctionType) for function in found.values()):
        return None
    names = {**vars(F), "has_torch_function": _nobody_asks}
    for name, function in found.items():
        assert isinstance(function, FunctionType)
        copied = FunctionType(function.__code__, names, name, function.__defaults__, function.__closure__)
        copied.__kwdefaults__ = function.__kwdefaults__
        names[name] = copied
    return names[_NAMES[0]]
