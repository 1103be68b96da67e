"""The build backend: setuptools, with one wheel for all Pythons.

The kernels have a plain C interface and are loaded by ctypes, so a wheel depends on the platform and on no Python
version: ``py3-none-<platform>``, or ``py3-none-any`` where there was no compiler (the package then runs on its
reference operations). ``pyproject.toml`` names these classes.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

_SUFFIX = ".pyd" if os.name == "nt" else ".so"


class Kernels(build_ext):
    """Kernels whose file names carry no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        """``_cpu.so`` and not ``_cpu.cpython-311-x86_64-linux-gnu.so``."""
        return os.path.join(*fullname.split(".")) + _SUFFIX

    def run(self) -> None:
        """Build, and where that is in place remove what earlier builds left under another name."""
        super().run()
        for built in map(Path, self.built() if self.inplace else ()):
            for other in set(built.parent.glob(f"{built.stem}.*{_SUFFIX}")) - {built}:
                other.unlink()

    def built(self) -> list[str]:
        """The kernels that are there: an optional extension may have failed to build."""
        return [path for path in map(self.get_ext_fullpath, (e.name for e in self.extensions)) if os.path.exists(path)]


class Wheel(bdist_wheel):
    """A wheel whose tag names no Python version, and no platform where no kernel was built."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>`` or ``py3-none-any``."""
        if not self.get_finalized_command("build_ext").built():
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


class Source(sdist):
    """A source distribution that can be built: with this file; and without the tests, which need the repository."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """What setuptools takes less ``tests/``, and the backend."""
        files = [name for name in files if not name.startswith("tests" + os.sep)]
        super().make_release_tree(base_dir, [*files, os.path.join(".ci", "lpsgld_build.py")])
