"""What the environment says of the compiled CPU kernels, read in one place for all of them."""

from __future__ import annotations

import os

__all__ = ["CPU_VARIABLE", "LEVELS", "THREADS_VARIABLE", "cpu_limit", "own_threads"]

#: ``0`` turns the compiled CPU kernels off, a name of :data:`LEVELS` limits their instruction set.
CPU_VARIABLE = "LIGHTNING_LPSGLD_CPU"
#: ``torch`` (work on its OpenMP threads where it has them) or ``own`` (on threads that sleep between calls).
THREADS_VARIABLE = "LIGHTNING_LPSGLD_THREADS"
#: Instruction sets by what the variable calls them.
LEVELS = {"baseline": 0, "avx2": 1, "avx512": 2}


def cpu_limit() -> tuple[int | None, str | None]:
    """The highest instruction set that may be used, and why none may.

    Returns:
        A value of :data:`LEVELS`, ``None`` if there is no limit; and a sentence if the kernels are turned off or the
        variable holds something else than ``0``, ``1``, nothing or a name of :data:`LEVELS`, else ``None``.
    """
    wish = os.environ.get(CPU_VARIABLE, "")
    if wish == "0":
        return None, f"it is turned off by the environment variable {CPU_VARIABLE}=0."
    if wish not in ("", "1", *LEVELS):
        return None, f"{CPU_VARIABLE} must be 0, 1 or one of {sorted(LEVELS)}, got {wish!r}."
    return LEVELS.get(wish), None


def own_threads() -> tuple[bool, str | None]:
    """Whether kernels are asked to keep off torch's threads, and a sentence if the variable holds something else."""
    wish = os.environ.get(THREADS_VARIABLE, "")
    if wish not in ("", "torch", "own"):
        return False, f"{THREADS_VARIABLE} must be torch or own, got {wish!r}."
    return wish == "own", None
