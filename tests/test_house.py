"""The house stays in order: no circle of imports, no private name of another file, nothing that outgrows a page.

Where the package does not keep a rule yet, the exception stands in a list with its reason. Lists only shrink: an entry
that is not needed any more fails too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_lpsgld

PACKAGE = Path(lightning_lpsgld.__file__).parent
LONGEST_MODULE, LONGEST_BODY = 400, 50

#: Circles that are still there, each as the set of its modules.
CIRCLES: dict[frozenset[str], str] = {}
#: Private names that are still imported: (importing module, name) -> reason.
PRIVATE: dict[tuple[str, str], str] = {}
#: Modules over the limit -> reason.
MODULES: dict[str, str] = {}
#: Functions over the limit -> reason.
BODIES: dict[str, str] = {}

#: Checks of a format's class outside ``formats/``: module -> (how many, reason); at most ten in all.
FORMAT_CHECKS: dict[str, tuple[int, str]] = {
    "analysis.block_laws": (1, "an exact law, of blocks of one element whose codes are integers: of that format alone"),
    "analysis.onestep": (1, "an exact law, of grids that are one small, even, finite set: of fixed point alone"),
    "analysis.stationary": (2, "which of the two exact laws above is meant"),
    "analysis.sum_law": (2, "the even grid of a sum: of fixed point, or a block held at one exponent"),
    "ops.functional": (1, "whether an argument is a format yet; what is neither that nor a string is parsed each time"),
    "samplers.saved_state": (1, "which arguments of a sampler are saved as text"),
}
MOST_FORMAT_CHECKS = 10


def modules_in(package: Path) -> dict[str, ast.Module]:
    """Parsed files of a package, by dotted name below it; the package's own ``__init__`` is ``""``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imported_names(tree: ast.Module, root: str):
    """(module, name) of every import from the package ``root``, wherever it stands; typing-only ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == root:
            for alias in node.names:
                yield node.module.partition(".")[2], alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == root:
                    yield alias.name.partition(".")[2], ""


def imports_between(modules: dict[str, ast.Module], root: str) -> dict[str, set[str]]:
    """Which modules each module imports; a name of a package counts as its module if there is one of that name."""
    edges: dict[str, set[str]] = {}
    for module, tree in modules.items():
        targets = set()
        for source, name in imported_names(tree, root):
            inner = f"{source}.{name}".strip(".")
            targets.add(inner if inner in modules else source)
        edges[module] = (targets & modules.keys()) - {module}
    return edges


def circles_of(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules each of which reaches all others of the group (strongly connected components)."""
    reach = {module: set(targets) for module, targets in edges.items()}
    for middle in edges:
        for start in edges:
            if middle in reach[start]:
                reach[start] |= reach[middle]
    return {
        frozenset(other for other in edges if other in reach[module] and module in reach[other])
        for module in edges
        if module in reach[module]
    }


def private_imports(modules: dict[str, ast.Module], root: str) -> set[tuple[str, str]]:
    """(importing module, name) of private names imported from another file."""
    return {
        (module, name)
        for module, tree in modules.items()
        for _, name in imported_names(tree, root)
        if name.startswith("_") and not name.startswith("__")
    }


def format_classes(modules: dict[str, ast.Module]) -> set[str]:
    """Names of the classes in ``formats/`` that are formats: ``NumberFormat``, and what derives from it."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for module, tree in modules.items()
        if module.split(".")[0] == "formats"
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    found = {"NumberFormat"}
    while more := {name for name, over in bases.items() if over & found} - found:
        found |= more
    return found


def format_checks(tree: ast.Module, root: str, classes: set[str]) -> int:
    """How often a module asks for the class of a format: ``isinstance``, comparisons of types, ``match`` patterns."""
    names = set(classes)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(root):
            names |= {alias.asname for alias in node.names if alias.name in classes and alias.asname}

    def is_class(node: ast.AST) -> bool:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(map(is_class, node.elts))
        if isinstance(node, ast.BinOp):
            return is_class(node.left) or is_class(node.right)
        return (isinstance(node, ast.Name) and node.id in names) or getattr(node, "attr", None) in classes

    for node in tree.body:  # a tuple of classes under a name of its own
        if isinstance(node, ast.Assign) and is_class(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return sum(any(map(is_class, asked_for(node))) for node in ast.walk(tree))


def asked_for(node: ast.AST) -> list[ast.AST]:
    """What a class would be checked against, if ``node`` is such a check."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
        return [node.args[1]]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    return [node.cls] if isinstance(node, ast.MatchClass) else []


def all_format_checks(modules: dict[str, ast.Module], root: str) -> dict[str, int]:
    """Checks per module outside ``formats/``, where there are any."""
    classes = format_classes(modules)
    outside = {module: tree for module, tree in modules.items() if module.split(".")[0] != "formats"}
    counts = {module: format_checks(tree, root, classes) for module, tree in outside.items()}
    return {module: count for module, count in counts.items() if count}


def body_length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def long_bodies(modules: dict[str, ast.Module]) -> dict[str, int]:
    """Functions over the limit, with their lines."""
    found = {}
    for module, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and body_length(node) > LONGEST_BODY:
                found[f"{module}.{node.name}"] = body_length(node)
    return found


def long_modules(package: Path) -> dict[str, int]:
    """Files over the limit, with their lines."""
    lengths = {
        ".".join(path.relative_to(package).with_suffix("").parts): len(path.read_text().splitlines())
        for path in package.rglob("*.py")
    }
    return {module: lines for module, lines in lengths.items() if lines > LONGEST_MODULE}


def check(found, allowed, rule: str) -> None:
    """What is found is allowed, and what is allowed is found."""
    new, old = set(found) - set(allowed), set(allowed) - set(found)
    assert not new, f"{rule}: {sorted(map(str, new))}"
    assert not old, f"kept by now, take it off the list of exceptions ({rule}): {sorted(map(str, old))}"


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    return modules_in(PACKAGE)


def test_no_circle_of_imports(modules):
    check(circles_of(imports_between(modules, PACKAGE.name)), CIRCLES, "modules import each other")


def test_no_private_name_of_another_file(modules):
    check(private_imports(modules, PACKAGE.name), PRIVATE, "a private name is imported from another file")


def test_modules_fit(modules):
    check(long_modules(PACKAGE), MODULES, f"a module has more than {LONGEST_MODULE} lines")


def test_functions_fit(modules):
    check(long_bodies(modules), BODIES, f"a function's body has more than {LONGEST_BODY} lines")


def test_formats_are_asked_and_their_classes_are_not(modules):
    found = all_format_checks(modules, PACKAGE.name)
    assert found == {module: count for module, (count, _) in FORMAT_CHECKS.items()}
    assert sum(found.values()) <= MOST_FORMAT_CHECKS


# ------------------------------------------------------------------------------------------- the checkers see a fault


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "low.py").write_text('"""Low."""\nVALUE = 1\n')
    (tmp_path / "high.py").write_text("from pkg.low import VALUE\n")
    return tmp_path


def found_circles(package: Path) -> set[frozenset[str]]:
    return circles_of(imports_between(modules_in(package), "pkg"))


def test_a_package_in_order_passes(package):
    modules = modules_in(package)
    assert not found_circles(package)
    assert not private_imports(modules, "pkg")
    assert not long_bodies(modules)
    assert not long_modules(package)


@pytest.mark.parametrize(
    "line",
    [
        "from pkg.high import other",
        "from pkg import high",
        "import pkg.high",
        "def f():\n    from pkg.high import other",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.high import other",
    ],
)
def test_a_circle_is_seen_however_it_is_hidden(package, line):
    (package / "low.py").write_text(line + "\n")
    assert found_circles(package) == {frozenset({"low", "high"})}


def test_a_circle_through_a_third_file_is_seen(package):
    (package / "low.py").write_text("from pkg.third import x\n")
    (package / "third.py").write_text("from pkg.high import y\n")
    assert found_circles(package) == {frozenset({"low", "high", "third"})}


def test_private_names_and_lengths_are_seen(package):
    (package / "high.py").write_text("from pkg.low import _hidden\n")
    lines = "".join(f"    x = {i}\n" for i in range(LONGEST_BODY + 1))
    (package / "low.py").write_text('def f():\n    """Docstring."""\n' + lines + "#\n" * LONGEST_MODULE)
    modules = modules_in(package)
    assert private_imports(modules, "pkg") == {("high", "_hidden")}
    assert long_bodies(modules) == {"low.f": LONGEST_BODY + 1}
    assert long_modules(package) == {"low": 2 + LONGEST_BODY + 1 + LONGEST_MODULE}


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("isinstance(x, FixedPoint)", 1),
        ("isinstance(x, (int, pkg.formats.FixedPoint)) or issubclass(type(x), NumberFormat)", 2),
        ("type(x) is FixedPoint", 1),
        ("type(x) in (int, FixedPoint)", 1),
        ("match x:\n    case FixedPoint(8):\n        pass", 1),
        ("KINDS = (FixedPoint, int)\nisinstance(x, KINDS)", 1),
        ("from pkg.formats import FixedPoint as F\nisinstance(x, F)", 1),
        ("x == FixedPoint(8) or FixedPoint(8).bits == 3 or isinstance(x, int)", 0),
        ("FixedPoint(8)", 0),
    ],
)
def test_checks_of_formats_are_counted(package, code, count):
    (package / "formats.py").write_text(
        "class NumberFormat: ...\nclass Kind(NumberFormat): ...\nclass FixedPoint(Kind): ...\nclass Other: ...\n"
    )
    (package / "high.py").write_text(f"from pkg.formats import FixedPoint, NumberFormat\n{code}\n")
    assert all_format_checks(modules_in(package), "pkg").get("high", 0) == count


def test_an_exception_that_is_not_needed_fails():
    with pytest.raises(AssertionError, match="take it off"):
        check(set(), {"gone": "reason"}, "rule")
    with pytest.raises(AssertionError, match=r"rule: .*new"):
        check({"new"}, {}, "rule")
