"""The release: one version everywhere, wheels for all Pythons, and the checklist itself (slow: clean venvs)."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_lpsgld
from lightning_lpsgld.ops.cpu_library import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checklist() -> dict:
    return runpy.run_path(str(ROOT / ".ci" / "release"))


def test_the_version_is_the_same_everywhere(checklist):
    assert checklist["check_versions"](allow_unreleased=True) == lightning_lpsgld.__version__


def test_another_version_somewhere_ends_the_release(checklist, tmp_path, monkeypatch):
    for name in ("lightning_lpsgld/__init__.py", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    citation = tmp_path / "CITATION.cff"
    citation.write_text(citation.read_text().replace(f"version: {lightning_lpsgld.__version__}", "version: 9.9.9"))
    monkeypatch.setitem(checklist["one"].__globals__, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"CITATION\.cff says 9\.9\.9"):
        checklist["check_versions"](allow_unreleased=True)


def test_an_unreleased_section_on_top_ends_the_release(checklist):
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md says"):
        checklist["check_versions"](allow_unreleased=False)


def test_kernels_have_names_without_a_python_version():
    build = runpy.run_path(str(ROOT / ".ci" / "lpsgld_build.py"))
    from setuptools import Distribution

    name = build["Kernels"](Distribution()).get_ext_filename("lightning_lpsgld.ops._cpu")
    assert name == str(Path("lightning_lpsgld/ops/_cpu.so"))


def test_the_smoke_test_passes_here(tmp_path):
    backend = "reference" if load()[0] is None else "fused"
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "smoke.py", "--backend", backend], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{lightning_lpsgld.__version__}: {backend}" in done.stdout


def test_the_smoke_test_knows_an_installation_without_kernels(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "smoke.py", "--backend", "fused"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"LIGHTNING_LPSGLD_CPU": "0"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "the installation runs on the reference operations, expected fused" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_checklist_passes_in_clean_environments(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "release", "--dry-run", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "py3-none-" in done.stdout
    assert ": fused" in done.stdout
    assert ": reference" in done.stdout
