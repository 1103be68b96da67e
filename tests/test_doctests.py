"""Every example in a docstring of the package runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import lightning_lpsgld

MODULES = sorted(info.name for info in pkgutil.walk_packages(lightning_lpsgld.__path__, "lightning_lpsgld."))
EXTENSIONS = ("lightning_lpsgld.ops._cpu", "lightning_lpsgld.linear._kernels")  # plain shared libraries


@pytest.mark.parametrize("name", [m for m in MODULES if m not in EXTENSIONS])
def test_examples(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(f"lightning_lpsgld.{name}") for name in ("ops.functional", "samplers.sgld")]
    assert all(any(test.examples for test in finder.find(module)) for module in modules)
