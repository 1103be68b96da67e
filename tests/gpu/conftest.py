"""These tests run on a CUDA device and are skipped without one.

``GPU_TESTS_DEVICE=cpu`` runs their bodies on the CPU instead, on the kernels that are there: a rehearsal that finds
faults of the tests themselves (with ``TRITON_INTERPRET=1`` the Triton kernels are interpreted). What is said of a
device only, such as not waiting for it, is skipped then.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import triton_checks

HERE = Path(__file__).parent
DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cpu" or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture
def device() -> str:
    """Where tensors lie."""
    return DEVICE


@pytest.fixture
def cuda(device: str) -> str:
    """The device, if it is one."""
    if device == "cpu":
        pytest.skip("says something of a CUDA device only")
    return device


@pytest.fixture
def kernels(device: str) -> str:
    """The fused backend of the device."""
    return "triton" if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "cpu"


@pytest.fixture
def accelerator(device: str) -> str:
    """The same for a Trainer."""
    return "gpu" if device == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def _here(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_checks, "DEVICE", device)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With ``GPU_TESTS_LOG=FILE`` each outcome is written as it comes, for runs that may be cut short."""
    log = os.environ.get("GPU_TESTS_LOG")
    if not log or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    why = report.longreprtext if report.failed else str(report.longrepr or "")
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "why": why[-3000:]}
    with open(log, "a") as file:
        file.write(json.dumps(row) + "\n")
