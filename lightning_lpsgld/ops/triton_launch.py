"""Starting Triton kernels again and again with little work of the host.

``kernel[grid](*args, **meta)`` looks up the compiled kernel by all of its arguments at every call, which takes tens of
microseconds: more than most kernels here run. A :class:`Start` has all but the run-time arguments fixed, does that once
and from then on starts what it found. This module does not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

__all__ = ["Start"]

#: Versions of Triton whose compiled kernels are known to take all arguments, compile-time ones too, in their order.
_KNOWN_VERSIONS = ((3, 6), (3, 8))


@cache
def _compiled_kernel() -> type | None:
    """The class of compiled kernels that can be started themselves, ``None`` if this Triton's are not known."""
    import triton
    from triton.compiler import CompiledKernel

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return CompiledKernel if _KNOWN_VERSIONS[0] <= version <= _KNOWN_VERSIONS[1] else None


class Start:
    """A kernel with its grid, device and compile-time arguments.

    What Triton would compile anew for must be the same at every call: dtypes, and which addresses are multiples of 16.
    Integers must be among the kernel's ``do_not_specialize`` and annotated.

    Args:
        kernel: A function under ``triton.jit``.
        programs: How many; with 0 nothing is ever started.
        device: Of the tensors.
        meta: Compile-time arguments and launch options.
    """

    __slots__ = ("constants", "device", "found", "kernel", "meta", "programs")

    def __init__(self, kernel: Any, programs: int, device: torch.device, meta: dict[str, Any]) -> None:
        self.kernel, self.programs, self.device, self.meta = kernel, programs, device, meta
        self.constants = tuple(meta[name] for name in kernel.arg_names if name in meta)
        self.found: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> None:
        """Start it with these run-time arguments, on the current stream of its device."""
        if not self.programs:
            return
        if self.device.type != "cuda" or self.device.index in (None, torch.cuda.current_device()):
            context: Any = nullcontext()
        else:
            context = torch.cuda.device(self.device)
        with context:
            if self.found is not None:
                self.found(*args, *self.constants)
            else:
                self._first(*args)

    def _first(self, *args: Any) -> None:
        """By Triton's own way, which compiles; what it started is kept."""
        compiled: Any = self.kernel[(self.programs,)](*args, **self.meta)
        known = None if compiled is None else _compiled_kernel()
        startable = known is not None and isinstance(compiled, known)
        if startable:
            self.found = compiled[(self.programs, 1, 1)]
