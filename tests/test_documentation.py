"""The documents: snippets compile and their imports exist, links lead somewhere, file names are those of files."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
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
#: Pages whose snippets take something for granted, and go on from one another.
TOGETHER = {page for page, _, _ in SNIPPETS if page.name not in PROGRAMS and page.parent.name != "notebooks"}


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


@pytest.mark.parametrize("page", [p for p in PAGES if p in TOGETHER], ids=name)
@pytest.mark.filterwarnings("ignore")
def test_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    """In one namespace with what the page takes for granted; those of the notebooks are run by ``.ci/notebooks``."""
    from helpers.snippets import namespace

    monkeypatch.chdir(tmp_path)
    known = namespace()
    if page.name == "README.md":
        known["trainer"] = None  # it makes its own
        shutil.rmtree("bank")
    if page.name == "durability.md":
        shutil.rmtree("bank")
    for found, number, code in SNIPPETS:
        if found == page:
            exec(compile(code, f"{page.name}[{number}]", "exec"), known)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=name)
def test_the_first_line_of_a_page_says_what_it_is_for(page):
    lines = [line for line in page.read_text().splitlines() if line.strip()]
    assert lines[0].startswith("# ")
    assert lines[1].startswith("What this page is for: "), lines[1]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples" / "notebooks").glob("*.py")))
def test_notebooks_are_those_of_their_sources_and_were_executed(name):
    command = runpy.run_path(str(ROOT / ".ci" / "notebooks"))
    book = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]
    wanted = command["cells_of"]((ROOT / "examples" / "notebooks" / f"{name}.py").read_text())
    assert cells == wanted, "run .ci/notebooks"
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    page = (ROOT / "docs" / "notebooks" / f"{name}.md").read_text()
    assert all(text in page for _, text in wanted)


@pytest.mark.slow
def test_notebooks_run(tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "notebooks", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("*.ipynb"))) == 2


@pytest.mark.slow
def test_the_site_builds_without_a_warning_or_a_dead_link(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "docs", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_dead_links_and_raw_markup_are_found(tmp_path):
    """The checks of ``.ci/docs`` on a site with one of each."""
    command = runpy.run_path(str(ROOT / ".ci" / "docs"))
    (tmp_path / "reference").mkdir()
    (tmp_path / "a.html").write_text('<a href="b.html">x</a><a href="#here">x</a><p id="here"><a href="none.html#x">')
    (tmp_path / "b.html").write_text('<a href="a.html#here">x</a><a href="a.html#there">x</a><a href="https://x.y/z">')
    (tmp_path / "reference" / "c.html").write_text("see :func:`.quantize`")
    assert command["dead_links"](tmp_path) == [
        "a.html: none.html#x leads nowhere", "b.html: a.html#there has no such anchor"
    ]  # fmt: skip
    assert command["raw_markup"](tmp_path) == ["c.html: :func:`.quantize`"]


def test_advice_names_rows_of_the_study_with_their_scores():
    """Every row of docs/choosing.md's table is in the study's results, seed 0, with the scores that are printed."""
    rows = list(csv.DictReader((ROOT / "examples" / "results" / "study" / "rows.csv").open()))
    scores = {
        (row["data"], f"{row['method']}/{row['format']}"): (
            f"{100 * float(row['error']):.2f}",
            f"{float(row['nll']):.4f}",
        )
        for row in rows
        if (row["of"], row["seed"], row["size"]) == ("ensemble", "0", "5000")
        and float(row["temperature"]) in (0.0, 1e-3)
    }
    text = (ROOT / "docs" / "choosing.md").read_text()
    printed = re.findall(r"^\|[^|]*\| `([\w/-]+)`(, plain images)? \| ([\d.]+) \| ([\d.]+) \|", text, flags=re.M)
    assert len(printed) >= 15
    for row, plain, error, nll in printed:
        assert (error, nll) == scores["fashion-mnist-plain" if plain else "fashion-mnist", row], row


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
