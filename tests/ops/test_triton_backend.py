"""The Triton backend without a GPU: its kernels in Triton's interpreter, and compiled ahead of time.

Triton decides when it is imported whether it interprets, so the checks (``helpers.triton_checks``) run in one child
process; each check is a test here. What this cannot see: scheduling and memory ordering on a real device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.crossings import DRIVEN
from helpers.triton_checks import cases

from lightning_lpsgld.ops import quantize

ROOT = Path(__file__).parents[2]


def child(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a Python process that sees this checkout."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.Popen([sys.executable, *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip # noqa: E501


def lines(process: subprocess.Popen[str], timeout: float = 600) -> list[dict[str, Any]]:
    """What the child reported."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


requires_triton = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("triton") is None, reason="needs the triton package"
)


@pytest.fixture(scope="module")
def children() -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Interpreter and compiler, side by side."""
    script = str(ROOT / "tests" / "benchmarks" / "compile_triton.py")
    # the checks compare every kernel themselves, so the check at first use would only take time
    trusting = {"TRITON_INTERPRET": "1", "LIGHTNING_LPSGLD_SELF_CHECK": "off"}
    return child(["-m", "helpers.triton_checks"], **trusting), child([script, "--json"])


@pytest.fixture(scope="module")
def outcomes(children: tuple[Any, Any]) -> dict[str, dict[str, Any]]:
    """Result of every check in the interpreter."""
    return {line["name"]: line for line in lines(children[0])}


@pytest.fixture(scope="module")
def compiled(children: tuple[Any, Any], outcomes: Any) -> list[dict[str, Any]]:
    """What ptxas says of the representative kernels."""
    return lines(children[1])


@requires_triton
@pytest.mark.parametrize("name", [name for name, _, _ in cases()])
def test_interpreted_kernels(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """Each check of this file, run under Triton's interpreter."""
    assert outcomes[name]["error"] is None, outcomes[name]["error"]


@requires_triton
@pytest.mark.slow
def test_all_chains_over_powers_of_two() -> None:
    """Every sampler, boundary, block and temperature in the interpreter: minutes."""
    trusting = {"TRITON_INTERPRET": "1", "LIGHTNING_LPSGLD_SELF_CHECK": "off"}
    seen = lines(child(["-m", "helpers.triton_checks", "--powers"], **trusting), timeout=3600)
    assert [line["error"] for line in seen] == [None] * len(DRIVEN)


@requires_triton
def test_compiled_kernels_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    """sm_80 and sm_90: nothing is spilled, nothing lies on the stack."""
    assert {row["target"] for row in compiled} == {"sm_80", "sm_90"}
    assert [row for row in compiled if row["spill_bytes"] != 0 or row["stack_bytes"] != 0] == []


@requires_triton
def test_compiled_kernels_move_each_tensor_once(compiled: list[dict[str, Any]]) -> None:
    """float32 bytes of one read of weight and gradient (and accumulator) and one write of weight (and accumulator)."""
    for row in compiled:
        if ", W e4m3" in row["kernel"]:
            continue  # rows too long for its registers: the gradient is read twice
        expected = 8 if row["kernel"].startswith("quantize") else 16 if "step full" in row["kernel"] else 12
        assert row["bytes_per_element"] == expected, row


def test_importing_the_package_does_not_import_triton() -> None:
    """Triton is imported when its kernels are first asked for."""
    code = "import sys, lightning_lpsgld.ops.triton; print('{}') if 'triton' not in sys.modules else 1/0"
    assert lines(child(["-c", code])) == [{}]


def test_without_a_gpu_the_backend_says_so() -> None:
    """On a machine without CUDA the reason is given; CPU tensors are refused in any case."""
    with pytest.raises(RuntimeError, match="cannot run quantize here"):
        quantize(torch.zeros(3), "bfp8", rounding="nearest", backend="triton")
