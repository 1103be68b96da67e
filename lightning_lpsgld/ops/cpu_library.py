"""The library of the fused CPU kernels: where it is, whether it can be used, and the structures of its C interface."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lightning_lpsgld.environment import LEVELS, cpu_limit, own_threads

__all__ = ["LEVELS", "Format", "Key", "Motion", "MotionTensor", "Shape", "Step", "StepTensor", "load", "team_of_torch"]

_VERSION = 5


class Format(ctypes.Structure):
    """A number format for one dtype: gap = 2^(E + offset), E in [low, high]."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "offset", "low", "high")),
        *((name, ctypes.c_float) for name in ("code_min", "code_max", "value_min", "value_max")),
        *((name, ctypes.c_int32) for name in ("mantissa", "bias", "bits", "nan", "carry")),
        *((name, ctypes.c_int32) for name in ("run", "scale_low", "scale_high", "fits", "hole")),
    ]


class Key(ctypes.Structure):
    """The fields of a :class:`~lightning_lpsgld.random.DrawKey`, and the seeds of the keys of :mod:`.carry`."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("carry", ctypes.c_uint64),
        ("hole", ctypes.c_uint64),
        ("step", ctypes.c_uint32),
        ("stream", ctypes.c_uint32),
    ]


class Shape(ctypes.Structure):
    """Size, block length (0: nothing shared) and, for channels-last memory, channels and pixels of a sample."""

    _fields_ = [(name, ctypes.c_int64) for name in ("numel", "inner", "channels", "pixels")]


class Step(ctypes.Structure):
    """A :class:`~lightning_lpsgld.ops.StepSpec`."""

    _fields_ = [
        ("variance", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("lr", "weight_decay", "noise")),
        *((name, ctypes.c_int32) for name in ("mode", "has_gradient_format")),
        ("weight", Format),
        ("gradient", Format),
    ]


class StepTensor(ctypes.Structure):
    """One tensor of a step; ``saturated`` is written by the kernel."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "accumulator", "grad")),
        *((name, ctypes.c_int64) for name in ("numel", "weight_inner", "gradient_inner", "channels", "pixels", "last")),
        ("weight_key", Key),
        ("gradient_key", Key),
        ("saturated", ctypes.c_int64),
    ]


class Motion(ctypes.Structure):
    """An ``UnderdampedSpec`` or a ``PreconditionedSpec`` of :mod:`lightning_lpsgld.ops.spec`."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("var_x", "var_v", "cov", "noise", "velocity_max")),
        *((name, ctypes.c_float) for name in ("keep", "carry", "kick", "shift", "slope")),
        *((name, ctypes.c_float) for name in ("lr", "weight_decay", "beta", "rest", "eps", "weight", "shrinkage")),
        *((name, ctypes.c_int32) for name in ("family", "mode", "has_gradient_format", "has_velocity_format")),
        *((name, ctypes.c_int32) for name in ("rescale", "scale_low", "scale_high")),
        *((name, Format) for name in ("position", "velocity", "gradient")),
    ]


class MotionTensor(ctypes.Structure):
    """One tensor of such a step; ``saturated`` and ``scale`` are written by the kernel."""

    _fields_ = [
        ("motion", ctypes.POINTER(Motion)),
        *((name, ctypes.c_void_p) for name in ("param", "accumulator", "state", "grad")),
        *((name, ctypes.c_int64) for name in ("numel", "weight_inner", "velocity_inner", "gradient_inner")),
        *((name, ctypes.c_int64) for name in ("channels", "pixels", "last")),
        *((name, Key) for name in ("weight_key", "velocity_key", "gradient_key")),
        ("saturated", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


def _path() -> str | None:
    spec = importlib.util.find_spec("lightning_lpsgld.ops._cpu")
    if spec is not None and spec.origin is not None:
        return spec.origin
    found = sorted(path for end in ("so", "pyd", "dylib") for path in Path(__file__).parent.glob(f"_cpu*.{end}"))
    return str(found[0]) if found else None


def team_of_torch() -> int | None:
    """Address of the function by which torch's OpenMP threads are given work, ``None`` where there is none to be found.

    It is ``GOMP_parallel``, which GNU's, LLVM's and Intel's run times have. The kernels work on these threads, because
    they spin for a while after every operator of torch, and any other thread would have to share a core with them.
    """
    if not torch.backends.openmp.is_available():
        return None
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):  # hidden, another run time, or Windows
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


@cache
def load() -> tuple[Any, str | None]:
    """The library, or ``None`` and the reason."""
    limit, reason = cpu_limit()
    own, wrong = own_threads()
    if reason or wrong:
        return None, reason or wrong
    path = _path()
    if path is None:
        return None, (
            "the fused CPU kernels were not built when the package was installed. Install it again where a C++17 "
            "compiler (GCC or Clang) is present."
        )
    try:
        library = ctypes.CDLL(path)
        version = library.lpsgld_version()
    except (OSError, AttributeError) as error:
        return None, f"the library {path} cannot be loaded ({error}). Install the package again."
    sizes = [ctypes.sizeof(kind) for kind in (Format, Key, Shape, Step, StepTensor, Motion, MotionTensor)]
    if version != _VERSION or sizes != [library.lpsgld_sizes(i) for i in range(len(sizes))]:
        return None, f"the library {path} belongs to another version of the package. Install the package again."
    library.lpsgld_target.restype = ctypes.c_char_p
    library.lpsgld_encode.restype = ctypes.c_int64
    library.lpsgld_level(-1 if limit is None else limit)
    library.lpsgld_team.argtypes = [ctypes.c_void_p]
    library.lpsgld_team(None if own else team_of_torch())
    return library, None
