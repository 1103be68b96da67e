"""Every row of the paper's tables as plugin arguments."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS", "preset_options"]

#: Formats of the two table sections. Fixed point rounds weights and gradients only, as the paper does, because
#: low-precision activations cost it much; block floating point rounds weights, gradients, activations and errors.
_FORMATS: dict[str, dict[str, Any]] = {
    "fp": {"weights": None, "gradients": None, "activations": None, "errors": None},
    "fixed8": {"weights": "fixed8.8", "gradients": "fixed8.8", "activations": None, "errors": None},
    "bfp8": {"weights": "bfp8", "gradients": "bfp8", "activations": "bfp8", "errors": "bfp8"},
}

_ALGORITHMS: dict[str, dict[str, Any]] = {
    "sgd": {"temperature": 0.0},
    "sgld": {},
    "csgld": {"cycles": 7},
    "sgdlp-f": {"temperature": 0.0, "accumulator": "full"},
    "sgldlp-f": {"accumulator": "full"},
    "csgldlp-f": {"accumulator": "full", "cycles": 7},
    "sgdlp-l": {"temperature": 0.0, "accumulator": "low"},
    "naive-sgldlp-l": {"accumulator": "low", "variance_corrected": False},
    "vc-sgldlp-l": {"accumulator": "low", "variance_corrected": True},
    "vc-csgldlp-l": {"accumulator": "low", "variance_corrected": True, "cycles": 7},
}

_FULL_PRECISION = ("sgd", "sgld", "csgld")

#: Preset name -> arguments; e.g. ``"sgldlp-f-fixed8"``, ``"vc-csgldlp-l-bfp8"``, ``"sgld-fp"``.
PRESETS: dict[str, dict[str, Any]] = {
    f"{algorithm}-{section}": {**_FORMATS[section], **options}
    for algorithm, options in _ALGORITHMS.items()
    for section in (("fp",) if algorithm in _FULL_PRECISION else ("fixed8", "bfp8"))
}


def preset_options(name: str) -> dict[str, Any]:
    """Arguments of the preset ``name``.

    Raises:
        ValueError: If there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"No preset is called {name!r}; the presets are {', '.join(PRESETS)}.")
    return dict(PRESETS[name])
