"""The documents: snippets compile and their imports exist, links lead somewhere, file names are those of files."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SNIPPETS = [
    (page, number, match)
    for page in PAGES
    for number, match in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S))
]
#: Pages whose snippets are programs: each runs from top to bottom.
PROGRAMS = {"start.md", "chains.md", "migrating.md"}


def name(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(("page", "number", "code"), SNIPPETS, ids=name)
def test_snippets_compile_and_import_what_exists(page, number, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lightning_lpsgld":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page.name}: {node.module} has no {alias.name}"


@pytest.mark.parametrize(("page", "number", "code"), [s for s in SNIPPETS if s[0].name in PROGRAMS], ids=name)
def test_snippets_that_are_programs_run(page, number, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("sklearn")
    exec(compile(code, f"{page.name}[{number}]", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_project_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
            assert anchor in {anchor_of(heading) for heading in headings}, f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / ".mkdocs.yml").read_text(), flags=re.M))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_the_map_names_files_that_exist():
    """Every path in back quotes on the map, relative to the package or to the repository."""
    page = ROOT / "docs" / "architecture.md"
    paths = re.findall(r"`([\w./-]+(?:\.py|\.cpp|/))`", page.read_text())
    assert len(paths) > 20
    missing = [p for p in paths if not (ROOT / p).exists() and not (ROOT / "lightning_lpsgld" / p).exists()]
    assert not missing, f"docs/architecture.md names {missing}"
