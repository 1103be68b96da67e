"""Bayesian deep learning in 8 bits: low-precision stochastic gradient Langevin dynamics for PyTorch Lightning.

Importing the package compiles nothing and touches no GPU. The names that need Lightning are imported when first used,
so the formats, ops and samplers work in a bare PyTorch loop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_lpsgld.formats import BlockFloatingPoint, FixedPoint, FloatingPoint, MicroscalingFloat

if TYPE_CHECKING:
    from lightning_lpsgld.bank import SampleBank
    from lightning_lpsgld.callbacks import EffectiveTemperature, EnsembleEvaluation, GradientShrinkage, SampleCollector
    from lightning_lpsgld.precision import LowPrecisionSGLD
    from lightning_lpsgld.predictive import LocalLearningCoefficient, PosteriorEnsemble

__all__ = [
    "BlockFloatingPoint",
    "EffectiveTemperature",
    "EnsembleEvaluation",
    "FixedPoint",
    "FloatingPoint",
    "GradientShrinkage",
    "LocalLearningCoefficient",
    "LowPrecisionSGLD",
    "MicroscalingFloat",
    "PosteriorEnsemble",
    "SampleBank",
    "SampleCollector",
    "__version__",
]

__version__ = "0.1.0"

_LAZY = {
    "SampleBank": "bank",
    "EffectiveTemperature": "callbacks",
    "EnsembleEvaluation": "callbacks",
    "GradientShrinkage": "callbacks",
    "SampleCollector": "callbacks",
    "LocalLearningCoefficient": "predictive",
    "LowPrecisionSGLD": "precision",
    "PosteriorEnsemble": "predictive",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
