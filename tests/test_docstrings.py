"""What every public name says of itself: arguments, what is returned and raised, and the source of an algorithm."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from types import FunctionType

import pytest

import lightning_lpsgld
from lightning_lpsgld.samplers.options import CentredOptions, SamplerOptions

PACKAGES = sorted(
    ["lightning_lpsgld", "lightning_lpsgld.random"]
    + [f"lightning_lpsgld.{info.name}" for info in pkgutil.iter_modules(lightning_lpsgld.__path__) if info.ispkg]
)
#: Errors that are about us and not about what was passed.
OURS = {"AssertionError", "AttributeError", "NotImplementedError"}
#: Names that implement something published: their docstrings say what.
PUBLISHED = {
    "lightning_lpsgld": (
        "LowPrecisionSGLD EffectiveTemperature GradientShrinkage LocalLearningCoefficient MicroscalingFloat"
    ),
    "lightning_lpsgld.samplers": "SGLD SGHMC PreconditionedSGLD SVRG HALP CyclicalStepSize PolynomialStepSize",
    "lightning_lpsgld.ops": "quantize_variance_corrected",
    "lightning_lpsgld.linear": "HALPRegressor HALPClassifier",
    "lightning_lpsgld.analysis": "naive_law vc_law stationary_law gradient_shrinkage chain_diagnostics",
    "lightning_lpsgld.metrics": (
        "brier_score area_under_risk_coverage adaptive_calibration_error calibration_error mixture_crps"
    ),
    "lightning_lpsgld.predictive": "class_scores",
    "lightning_lpsgld.predictive.selection": "stein_thinning",
    "lightning_lpsgld.random": "philox4x32",
}
#: Names that are called by users: their docstrings show a call, which the doctests run.
SHOWN = ("lightning_lpsgld", "lightning_lpsgld.samplers", "lightning_lpsgld.callbacks", "lightning_lpsgld.strategies")


def public() -> dict[str, object]:
    """Every function and class that a package lists, once, by the place where it is defined."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, (type, FunctionType)) and value.__module__.startswith("lightning_lpsgld"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


def methods(cls: type) -> dict[str, FunctionType]:
    """What a class defines itself and lets others call."""
    own = {name: getattr(value, "__func__", value) for name, value in vars(cls).items()}
    functions = {name: value for name, value in own.items() if isinstance(value, FunctionType)}
    written = {name: value for name, value in functions.items() if value.__module__ == cls.__module__}
    return {name: f for name, f in written.items() if not name.startswith("_") or name in ("__init__", "__post_init__")}


def says(doc: str, argument: str) -> bool:
    """Whether a section of a docstring has the argument."""
    return re.search(rf"^\s+\*{{0,2}}(?:\w+, )*{argument}(?:, \w+)*(?: \([^)]*\))?:", doc, flags=re.M) is not None


def undocumented(value: object, doc: str) -> list[str]:
    """Arguments that a docstring does not name; of a class those of its ``__init__``, or its fields."""
    if isinstance(value, type) and (issubclass(value, BaseException) or getattr(value, "_is_protocol", False)):
        return []
    fields = getattr(value, "__dataclass_fields__", None)
    if isinstance(value, type) and fields is not None and "__init__" not in methods(value):
        names = [name for name, field in fields.items() if field.init and not name.startswith("_")]
    elif not isinstance(value, type) or "__init__" in vars(value):
        own = vars(value) if isinstance(value, type) else {}
        names = list(inspect.signature(own.get("__new__", own.get("__init__", value))).parameters)
    else:
        names = []  # it is made as its base is
    elsewhere = (
        {} if "options.CentredOptions" not in doc else CentredOptions.__annotations__ | SamplerOptions.__annotations__
    )
    return [name for name in names if name not in ("self", "cls", *elsewhere) and not says(doc, name)]


def raised_in(function: FunctionType) -> set[str]:
    """Names of the errors that the body of a function raises itself, where it does not catch them."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = getattr(error, "id", getattr(error, "attr", ""))
            if name[:1].isupper():
                names.add(name)
    return names - OURS


NAMES = public()


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_errors_are_said(name):
    value = NAMES[name]
    doc = inspect.getdoc(value) or ""
    assert doc, f"{name} has no docstring"
    missing = undocumented(value, doc)
    assert not missing, f"{name}: arguments {missing} are not described"
    own = methods(value) if isinstance(value, type) else {"": value}
    for part, function in own.items():
        said = doc + (inspect.getdoc(function) or "")
        assert inspect.getdoc(function) or part.startswith("__"), f"{name}.{part} has no docstring"
        unsaid = {error for error in raised_in(function) if error not in said}
        assert not unsaid, f"{name}.{part} raises {unsaid} without saying so"


@pytest.mark.parametrize(("package", "name"), [(p, n) for p, names in PUBLISHED.items() for n in names.split()])
def test_algorithms_name_their_source(package, name):
    doc = inspect.getdoc(getattr(importlib.import_module(package), name)) or ""
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|[A-Z][\w-]+.*, (19|20)\d\d", doc), f"{name} does not say where it is from"


@pytest.mark.parametrize("package", SHOWN)
def test_what_users_call_is_shown(package):
    module = importlib.import_module(package)
    values = [getattr(module, name) for name in module.__all__]
    called = [v for v in values if isinstance(v, (type, FunctionType)) and not getattr(v, "_is_protocol", False)]
    without = [v.__name__ for v in called if ">>>" not in (inspect.getdoc(v) or "") and not issubclass_of_error(v)]
    assert set(without) <= {"SamplerOptions", "GridOptions", "CentredOptions", "VarianceReduced"}  # bases, and types


def issubclass_of_error(value: object) -> bool:
    """Whether it is an error, which nobody calls."""
    return isinstance(value, type) and issubclass(value, BaseException)


def test_faults_are_seen():
    def fault(a, b):
        """Text.

        Args:
            a: It.
        """
        if a:
            raise ValueError(b)

    doc = inspect.getdoc(fault)
    assert undocumented(fault, doc) == ["b"]
    assert raised_in(fault) == {"ValueError"}
    assert says("Args:\n    x, y: Two.\n    **kwargs (int): Rest.", "y")
    assert says("Args:\n    **kwargs (int): Rest.", "kwargs")
    assert not says("Args:\n    x: A y: no.", "y")
