"""Both C++ kernels under the address and undefined-behaviour sanitizers: builds them so, and runs their tests.

::

    python tests/benchmarks/sanitize.py                  # every instruction set of this machine, some minutes
    python tests/benchmarks/sanitize.py --level avx2     # one of them
    python tests/benchmarks/sanitize.py -- -k philox     # arguments of pytest

Needs GCC or Clang with libasan and libubsan. The package and its tests are copied to a temporary folder, so that the
kernels of the installation stay as they are. A finding ends the run, names file and line, and the exit status is not 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "ops/_cpu": ("ops/cpu.cpp", "ops/evaluation.cpp", "ops/packing.cpp"),
    "linear/_kernels": ("linear/kernels.cpp",),
}
TESTS = (
    "tests/ops/test_cpu_backend.py", "tests/ops/test_block_top.py", "tests/ops/test_evaluation_chain.py",
    "tests/ops/test_cpu_finite.py", "tests/ops/test_cpu_motion.py", "tests/ops/test_cpu_scaled.py",
    "tests/linear/test_linear_halp.py",
)  # fmt: skip
LEVELS = ("baseline", "avx2", "avx512")
#: As in pyproject.toml, but for the optimization, and with what the sanitizers need.
FLAGS = (
    "-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-fPIC",
    "-shared", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
)  # fmt: skip
OWN_FLAGS = {"ops/_cpu": ("-ffp-contract=off",), "linear/_kernels": ()}


def build(folder: Path, compiler: str) -> None:
    """Put kernels with sanitizers into a copy of the package."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name, sources in KERNELS.items():
        for old in (folder / name).parent.glob(f"{Path(name).name}*.so"):
            old.unlink()
        print(f"building {', '.join(sources)}", flush=True)
        target = folder / f"{name}{suffix}"
        paths = [str(folder / source) for source in sources]
        subprocess.run([compiler, *FLAGS, *OWN_FLAGS[name], *paths, "-o", str(target)], check=True)


def preload(compiler: str) -> str:
    """Libraries to load before Python: the sanitizers', and the C++ library whose exceptions they watch."""
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    missing = [path for path in found if not Path(path).is_absolute()]
    if missing:
        sys.exit(
            f"{compiler} has no {', '.join(missing)}: install the sanitizers' libraries, or name a compiler by CXX."
        )
    return " ".join(found)


def environment(folder: Path, compiler: str, level: str) -> dict[str, str]:
    """Environment of a test run: findings stop it, with a stack; Python's own leaks are not looked for."""
    return {
        **os.environ,
        "LD_PRELOAD": preload(compiler),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "LIGHTNING_LPSGLD_CPU": level,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def run(folder: Path, compiler: str, level: str, arguments: list[str]) -> int:
    """Run the kernels' tests; pytest's exit status."""
    print(f"testing with LIGHTNING_LPSGLD_CPU={level}", flush=True)
    # `--capture=sys`: findings go to the file descriptor, and pytest would take what it caught with it when it dies
    command = [sys.executable, "-m", "pytest", "-qx", "--capture=sys", "-p", "no:cacheprovider", *TESTS, *arguments]
    return subprocess.run(command, cwd=folder, env=environment(folder, compiler, level)).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", choices=LEVELS, help="instruction set; default: one after the other")
    parser.add_argument("arguments", nargs="*", help="further arguments of pytest, after --")
    options = parser.parse_args()
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        sys.exit(f"no compiler {compiler!r}; name one by the environment variable CXX.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("lightning_lpsgld", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        build(folder / "lightning_lpsgld", compiler)
        levels = (options.level,) if options.level else LEVELS
        failed = [level for level in levels if run(folder, compiler, level, options.arguments)]
    if failed:
        sys.exit(f"findings or failures with {', '.join(failed)}")
    print("no finding: both kernels are clean under the address and undefined-behaviour sanitizers")


if __name__ == "__main__":
    main()
