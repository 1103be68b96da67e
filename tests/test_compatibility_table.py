"""The table of docs/compatibility.md is made of what was run."""

import importlib.machinery
import importlib.util
import re
import subprocess
from pathlib import Path

import compatibility
import pytest

NEWEST_PYTHON = 13


def test_the_compatibility_table_is_the_recorded_one():
    """Rows name tests that exist and messages that these demand; both ends of the supported versions were run.

    So was every Python from the lower bound on.
    """
    text = compatibility.PAGE.read_text()
    assert text == compatibility.page(text, compatibility.recorded()), "run .ci/compat --page"
    for row in compatibility.ROWS:
        file, function = compatibility.function_of(row)
        source = file.read_text()
        assert f"def {function}(" in source, row.test
        assert row.refusal in source.replace("\\", ""), f"{row.test} does not demand {row.refusal!r}"
    oldest, newest, *others = compatibility.recorded()
    project = (compatibility.ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'^    "(torch|lightning)>=([\d.]+)', project, flags=re.M))
    assert len(bounds) == 2
    for package, bound in bounds.items():
        assert oldest["versions"][package].startswith(bound)
    assert {row.test for row in compatibility.ROWS} == oldest["outcomes"].keys() == newest["outcomes"].keys()
    assert set(newest["outcomes"].values()) == {"passed"}
    needs = {row.test: "failed" if row.newer else "passed" for row in compatibility.ROWS}
    assert oldest["outcomes"] == needs
    assert all(run["outcomes"] == newest["outcomes"] for run in others)
    minors = {run["versions"]["Python"].rpartition(".")[0] for run in (oldest, newest, *others)}
    least = re.search(r'^requires-python = ">=3\.(\d+)"', project, flags=re.M)
    assert minors == {f"3.{minor}" for minor in range(int(least[1]), NEWEST_PYTHON + 1)}


def test_outcomes_of_rows_with_parameters():
    """A failure anywhere is a failure; what was skipped or not run is said."""
    row = compatibility.Row("area", "what", "a.py::test_x")
    outcomes = {"a.py::test_x[1]": "passed", "a.py::test_x[2]": "skipped", "a.py::test_xy": "failed"}
    assert compatibility.outcome_of(row, outcomes) == "passed"
    assert compatibility.outcome_of(row, outcomes | {"a.py::test_x[3]": "failed"}) == "failed"
    assert compatibility.outcome_of(row, {"a.py::test_x": "skipped"}) == "skipped"
    assert compatibility.outcome_of(row, {}) == "not run"
    one = compatibility.Row("area", "what", "a.py::test_x[1", "words")
    assert compatibility.outcome_of(one, {"a.py::test_x[1-2]": "passed", "a.py::test_x[2]": "failed"}) == "passed"
    assert compatibility.cell(one, {one.test: "passed"}) == "refused"
    assert compatibility.cell(one, {one.test: "failed"}) == "fails"


def test_a_venv_whose_installation_was_cut_short_is_made_anew(tmp_path, monkeypatch):
    loader = importlib.machinery.SourceFileLoader("compat", str(compatibility.ROOT / ".ci" / "compat"))
    compat = importlib.util.module_from_spec(importlib.util.spec_from_loader("compat", loader))
    loader.exec_module(compat)
    calls, failing = [], True

    def run(command, **options):
        calls.append([str(part) for part in command])
        return subprocess.CompletedProcess(command, int(failing and "pip" in command), stderr="")

    def environment():
        calls.clear()
        return compat.environment(Path("python"), tmp_path, ["torch==2.6.0"])

    monkeypatch.setattr(compat.subprocess, "run", run)
    for _ in range(2):  # what the first attempt left is not taken
        with pytest.raises(subprocess.CalledProcessError):
            environment()
        assert calls[0] == ["python", "-m", "venv", "--clear", str(tmp_path)]
    failing = False
    assert environment() == tmp_path / "bin" / "python"
    assert len(calls) == 2
    environment()
    assert [call[3] for call in calls] == ["install"]  # whole: only pip looks whether its packages are there
