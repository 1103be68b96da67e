"""The rows of the study: which method, in which format, at which temperature, for which seeds.

Every row of tables 1 and 2 of Zhang, Wilson & De Sa (2022), the rows of low-precision SGHMC, and accumulators of 16
bits; nothing here runs anything.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.samplers import SGHMC

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from published import paper_decay

__all__ = ["FORMATS", "METHODS", "Row", "decay", "learning_rate", "make_plugin", "paper_decay", "rows_of"]

#: Section of the tables -> formats. Fixed point rounds weights and gradients only, as the paper's does; its fraction
#: length is 6 instead of 8, because batch-norm scales start at 1, which 8 fraction bits of 8 cannot hold.
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {"weights": None, "gradients": None, "activations": None, "errors": None},
    "fixed8": {"weights": "fixed8.6", "gradients": "fixed8.6", "activations": None, "errors": None},
    "bfp8": {"weights": "bfp8", "gradients": "bfp8", "activations": "bfp8", "errors": "bfp8"},
    "bfp8-clamp": {
        "weights": "bfp8-clamp", "gradients": "bfp8-clamp", "activations": "bfp8-clamp", "errors": "bfp8-clamp",
    },
}  # fmt: skip

_LOW: dict[str, Any] = {"accumulator": "low"}
_FULL: dict[str, Any] = {"accumulator": "full"}
_CYCLES: dict[str, Any] = {"cycles": 4}
#: Accumulators of 16 bits by the format of the weights: the same range, 256 times as fine.
_SIXTEEN = {"fixed8": "fixed16.14", "bfp8": "bfp16"}

#: Method -> arguments of the plugin, beside formats, temperature and seed. Of ``sgd...`` the temperature is 0. An
#: accumulator of 16 bits is that of the row's format.
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgld": {},
    "csgld": _CYCLES,
    "sgdlp-l": _LOW,
    "sgdlp-f": _FULL,
    "naive-sgldlp-l": {**_LOW, "variance_corrected": False},
    "vc-sgldlp-l": _LOW,
    "sgldlp-f": _FULL,
    "vc-sgldlp-16": {"accumulator": "16 bits"},
    "vc-csgldlp-l": {**_LOW, **_CYCLES},
    "csgldlp-f": {**_FULL, **_CYCLES},
    "vc-csgldlp-16": {"accumulator": "16 bits", **_CYCLES},
    "sghmc": {"sampler": "sghmc"},
    "naive-sghmclp-l": {"sampler": "sghmc", **_LOW, "variance_corrected": False},
    "vc-sghmclp-l": {"sampler": "sghmc", **_LOW},
    "sghmclp-f": {"sampler": "sghmc", **_FULL},
}

_FLOAT_METHODS = ("sgd", "sgld", "csgld", "sghmc")
#: Temperatures of the methods that have one; the others run once.
_TEMPERATURES = (1e-3, 1e-2, 1.0)
#: Methods that are run at every temperature.
_TEMPERED = ("sgld", "naive-sgldlp-l", "vc-sgldlp-l", "vc-sgldlp-16", "sgldlp-f")
#: SGHMC with a time step of 0.1 and this friction is, to leading order, SGD with learning rate 0.01 and momentum 0.9.
_FRICTION, _TIME_STEP = 1.0, 0.1


@dataclass(frozen=True)
class Row:
    """One run of the study.

    Attributes:
        data: Name of the data set.
        size: Number of training images.
        method: Key of :data:`METHODS`.
        format: Key of :data:`FORMATS`.
        temperature: T; 0 for SGD.
        seed: Seed of weights, data order and sampler.
    """

    data: str
    size: int
    method: str
    format: str
    temperature: float
    seed: int

    @property
    def name(self) -> str:
        """A file name that only this run has."""
        return f"{self.data}-{self.size}-{self.method}-{self.format}-T{self.temperature:g}-s{self.seed}"


def rows_of(size: int, seeds: int, data: str = "fashion-mnist") -> list[Row]:
    """All rows, seed by seed, so that an interrupted study has every method before it has a second seed."""
    cells: list[tuple[str, str, float]] = []
    for name in METHODS:
        formats = ("fp32",) if name in _FLOAT_METHODS else ("fixed8", "bfp8")
        if name in ("sgdlp-l", "naive-sgldlp-l", "vc-sgldlp-l"):
            formats = (*formats, "bfp8-clamp")
        temperatures = (0.0,) if name.startswith("sgd") else _TEMPERATURES if name in _TEMPERED else (1e-3,)
        cells += [(name, fmt, t) for fmt in formats for t in temperatures if t == 1e-3 or fmt != "bfp8-clamp" or t == 0]
    cells.sort(key=lambda cell: cell[2] not in (0.0, 1e-3))  # the paper's temperature first
    return [Row(data, size, *cell, seed) for seed in range(seeds) for cell in cells]


def make_plugin(row: Row) -> LowPrecisionSGLD:
    """The plugin of a row."""
    options, formats = dict(METHODS[row.method]), FORMATS[row.format]
    if options.get("accumulator") == "16 bits":
        options["accumulator"] = _SIXTEEN[row.format]
    if options.get("sampler") == "sghmc":
        velocity = formats["weights"] if options.get("accumulator") == "low" else None
        options["sampler"] = functools.partial(SGHMC, friction=_FRICTION, velocity_format=velocity)
    return LowPrecisionSGLD(**formats, temperature=row.temperature, **options)


def learning_rate(row: Row) -> float:
    """Learning rate at the start: 0.2 for cycles, which begin anew, 0.1 else; of SGHMC the time of a step."""
    return _TIME_STEP if "sghmc" in row.method else 0.2 if "cycles" in METHODS[row.method] else 0.1


def decay(row: Row, progress: float) -> float:
    """Factor on the learning rate at a share ``progress`` of the run: the paper's schedule, or 1 for cycles.

    Constant to one half, then falling linearly to 1 % at nine tenths. The square root of it for SGHMC, whose learning
    rate is a time.
    """
    if "cycles" in METHODS[row.method]:
        return 1.0
    factor = paper_decay(progress)
    return factor**0.5 if "sghmc" in row.method else factor
