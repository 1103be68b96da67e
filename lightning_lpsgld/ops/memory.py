"""Memory that is let go goes back to the system: where floats live for one operation, what stays behind is the rest."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

__all__ = ["return_memory"]

_M_MMAP_THRESHOLD = -3
#: Bytes from which on a tensor gets memory of its own.
_OWN = 2 * 2**20


@cache
def return_memory() -> bool:
    """From now on, give tensors of 2 MiB and more memory of their own, which the system has back when they are freed.

    The C library of Linux (glibc) otherwise keeps what was freed below 32 MB for later, in pieces: several times what a
    network held as codes takes. Costs a page fault per 4 KiB of such a tensor. Holds for the whole process.

    Returns:
        Whether the C library knows of that.

    Example:
        >>> return_memory() == return_memory()
        True
    """
    if sys.platform != "linux":
        return False
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    return adjust is not None and adjust(_M_MMAP_THRESHOLD, _OWN) == 1
