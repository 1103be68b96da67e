"""Imports point one way, everything public is documented, and importing the package does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_lpsgld

PACKAGE = Path(lightning_lpsgld.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

#: Level of each file or folder directly under the package; a module imports from its own folder or a lower level.
LEVELS = {
    "arguments": 0,
    "environment": 0,
    "formats": 0,
    "random": 0,
    "ops": 1,
    "metrics": 1,
    "analysis": 2,
    "linear": 2,
    "casting": 2,
    "arithmetic": 2,
    "distributed": 2,
    "samplers": 2,
    "bank": 2,
    "predictive": 3,
    "precision": 4,
    "strategies": 4,
    "callbacks": 4,
    "serving": 4,
    "export": 4,
    "report": 5,
    "cli": 6,
}
#: From this level on ``lightning`` may be imported: below, everything works in a bare PyTorch loop.
HOST_LEVEL = 4
HOSTS = {"lightning", "pytorch_lightning", "lightning_fabric"}


def relative(path):
    return str(path.relative_to(PACKAGE))


def part_of(path):
    """First name under the package: ``ops`` for ``ops/reference.py``, ``formats`` for ``formats.py``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path):
    """Absolute names of all modules that a file imports anywhere, with their lines; typing-only ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def test_every_part_has_a_level():
    parts = {part_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert parts <= LEVELS.keys(), f"no level for {sorted(parts - LEVELS.keys())}"


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) not in ("__init__", "__main__")], ids=relative)
def test_imports_point_one_way(path):
    """From the own folder or a lower level; between two parts of one level there is no import."""
    own = part_of(path)
    for name, line in imports_of(path):
        parts = name.split(".")
        if parts[0] == "lightning_lpsgld" and len(parts) > 1 and parts[1] != own:
            # ``from lightning_lpsgld import X`` goes through the top and may reach anything.
            assert parts[1] in LEVELS, f"{relative(path)}:{line} imports {name} from the package's top"
            assert LEVELS[parts[1]] < LEVELS[own], f"{relative(path)}:{line} (level {LEVELS[own]}) imports {name}"
        if parts[0] in HOSTS:
            assert LEVELS[own] >= HOST_LEVEL, f"{relative(path)}:{line} (level {LEVELS[own]}) imports {name}"


def test_the_test_sees_an_upward_import(tmp_path, monkeypatch):
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    for source in (
        "from lightning_lpsgld.samplers import SGLD",
        "import lightning_lpsgld.metrics",
        "def f():\n    import lightning.pytorch",
        "from lightning_lpsgld import SampleBank",
        "from . import reference",
    ):
        bad = tmp_path / "ops" / "bad.py"
        bad.write_text(source)
        with pytest.raises(AssertionError):
            test_imports_point_one_way(bad)


def test_no_drawer_for_odds_and_ends():
    names = {"utils", "util", "helpers", "misc", "common"}
    assert not [relative(p) for p in MODULES if p.stem in names or names & set(p.relative_to(PACKAGE).parts[:-1])]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_postponed_annotations_and_module_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{relative(path)} has no module docstring"
    if path.name != "__init__.py":
        assert "from __future__ import annotations" in path.read_text()


def public_definitions(body, prefix=""):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def is_override(node):
    """Hooks keep the docstring of the class that defines them, where the override says so."""
    names = {d.id if isinstance(d, ast.Name) else getattr(d, "attr", "") for d in getattr(node, "decorator_list", [])}
    return bool(names & {"override", "overload", "setter"})


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    silent = [
        f"{relative(path)}:{node.lineno} {name}"
        for name, node in public_definitions(tree.body)
        if not is_override(node) and not ast.get_docstring(node)
    ]
    assert not silent, "no docstring: " + ", ".join(silent)


def exported_values(tree):
    """Names and lines of the values (no functions, no classes) that a module defines and lists in ``__all__``."""
    bound = [(node.targets[0] if isinstance(node, ast.Assign) else node.target, node) for node in tree.body
             if isinstance(node, (ast.Assign, ast.AnnAssign))]  # fmt: skip
    listed = next((ast.literal_eval(node.value) for name, node in bound if getattr(name, "id", "") == "__all__"), ())
    return [(name.id, node.lineno) for name, node in bound if isinstance(name, ast.Name) and name.id in listed]


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__init__.py"], ids=relative)
def test_every_exported_value_says_what_it_is(path):
    """In a ``#:`` line above: constants and aliases of types have no docstring."""
    lines = path.read_text().splitlines()
    silent = [
        name for name, line in exported_values(ast.parse(path.read_text())) if not lines[line - 2].startswith("#:")
    ]
    assert not silent, f"{relative(path)}: no #: line above {', '.join(silent)}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=relative)
def test_init_files_are_explicit_lists(path):
    """``__init__`` re-exports: no star, no logic but lazy lookup, and ``__all__`` names what it imports."""
    tree = ast.parse(path.read_text())
    for name, line in imports_of(path):
        assert not name.endswith(".*"), f"{relative(path)}:{line} star import"
    assigned = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assert "__all__" in assigned, f"{relative(path)} has no __all__"


IMPORT_AND_LOOK = """
import sys, torch
before = torch.get_rng_state()
import lightning_lpsgld
import lightning_lpsgld.ops, lightning_lpsgld.samplers
forbidden = {"triton", "qtorch.quant", "torch._inductor.compile_fx", "torch.utils.cpp_extension", "sklearn"}
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
assert torch.get_default_dtype() == torch.float32
print(sorted(forbidden & set(sys.modules) - set(BASE)))
"""


def loaded_by(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_importing_compiles_nothing_and_touches_no_gpu():
    """In a fresh process; what lightning and torchmetrics load by themselves does not count."""
    base = loaded_by("import sys, torch, lightning, torchmetrics; print(sorted(sys.modules))")
    assert loaded_by(f"BASE = {base}\n{IMPORT_AND_LOOK}") == "[]"


def test_lower_levels_load_without_lightning():
    """Below the plugin everything works in a bare PyTorch loop, without ``lightning`` installed at all."""
    parts = [part for part, level in LEVELS.items() if level < HOST_LEVEL]
    missing = [part for part in parts if not [p for p in MODULES if part_of(p) == part]]
    assert not missing, f"the design promises {missing}"
    code = f"""
import importlib, sys
for name in {sorted(HOSTS)}:
    sys.modules[name] = None
for part in {parts}:
    importlib.import_module("lightning_lpsgld." + part)
print("loaded")
"""
    assert loaded_by(code) == "loaded"
