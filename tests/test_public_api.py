"""The names and signatures that others write code against: a change here is a breaking change."""

from __future__ import annotations

import importlib
import inspect

import pytest

NAMES = {
    "lightning_lpsgld": (
        "LowPrecisionSGLD SampleCollector EnsembleEvaluation EffectiveTemperature FixedPoint BlockFloatingPoint "
        "FloatingPoint MicroscalingFloat SampleBank GradientShrinkage PosteriorEnsemble LocalLearningCoefficient"
    ),
    "lightning_lpsgld.random": "DrawKey",
    "lightning_lpsgld.ops": "quantize quantize_variance_corrected encode decode Encoded backend_report",
    "lightning_lpsgld.samplers": "SGLD SGHMC SVRG HALP PreconditionedSGLD CyclicalStepSize",
    "lightning_lpsgld.analysis": "stationary_law wasserstein2 gradient_shrinkage plan",
}

#: Positional parameters, then keyword-only ones that must exist; others may be added.
SIGNATURES = {
    "lightning_lpsgld.random:DrawKey": ("seed step stream", ""),
    "lightning_lpsgld.ops:quantize": ("x fmt", "rounding key backend"),
    "lightning_lpsgld.ops:quantize_variance_corrected": ("mean variance fmt", "key backend"),
    "lightning_lpsgld.ops:encode": ("x fmt", "rounding key"),
    "lightning_lpsgld.ops:decode": ("encoded dtype", ""),
    "lightning_lpsgld.samplers:SGLD": (
        "params lr",
        "num_data temperature weight_decay weight_format gradient_format accumulator variance_corrected seed backend",
    ),
    "lightning_lpsgld.samplers:SVRG": ("params lr", "weight_format"),
    "lightning_lpsgld.samplers:HALP": ("params lr", "mu word_length"),
    "lightning_lpsgld.analysis:gradient_shrinkage": ("quantized exact", ""),
    "lightning_lpsgld.analysis:stationary_law": ("update fmt", "lr temperature grad gradient_std"),
}


@pytest.mark.parametrize("module", NAMES)
def test_names_exist_and_are_listed(module):
    loaded = importlib.import_module(module)
    for name in NAMES[module].split():
        assert hasattr(loaded, name), f"{module} has no {name}"
        assert name in loaded.__all__, f"{name} is not in {module}.__all__"


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path):
    module, name = path.split(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    positional, keyword = (text.split() for text in SIGNATURES[path])
    assert list(parameters)[: len(positional)] == positional
    assert set(keyword) <= {n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_the_top_lists_what_it_gives():
    top = importlib.import_module("lightning_lpsgld")
    for name in top.__all__:
        assert getattr(top, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Sgld'"):
        _ = top.Sgld
