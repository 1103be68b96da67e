"""Fixtures that every test gets, and the backends that tests run over."""

from __future__ import annotations

import logging
import os
import sys

import pytest
import torch

from lightning_lpsgld.ops import backend_report

#: Backends that draw from keys and so must agree with the reference; a missing one is skipped by name.
SEEDED_BACKENDS = ("reference", "cpu")

#: Variables that Lightning and torch set for good when they are imported, seeded or set up for a distributed run. With
#: a CUDA device Lightning's accelerator sets the order of devices, and inductor where Triton has its cache and ptxas.
_ENVIRONMENT_THAT_MAY_CHANGE = (
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "PYTEST_CURRENT_TEST",
    "KMP_",
    "TORCHINDUCTOR_",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "CUDA_DEVICE_ORDER",
    "TRITON_CACHE_DIR",
    "TRITON_PTXAS_PATH",
)


# Tiny tensors: a second thread costs more than it gives, and much more where several test processes share two cores.
torch.set_num_threads(1)


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(_ENVIRONMENT_THAT_MAY_CHANGE)}


def _printed_to():
    """The file that rich's console of the process was sent to: what Lightning prints then is in no output."""
    return getattr(getattr(sys.modules.get("rich"), "_console", None), "_file", None)


@pytest.fixture(autouse=True)
def no_leaks():
    """Fail a test that leaves the default dtype, threads, grad mode, environment or rich's console changed."""
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), _environment())
    level, file = logging.getLogger().level, _printed_to()
    yield
    after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), _environment())
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])
    torch.set_grad_enabled(before[2])
    for name in after[3].keys() - before[3].keys():
        del os.environ[name]
    os.environ.update(before[3])
    logging.getLogger().setLevel(level)
    changed = {k for k in before[3].keys() | after[3].keys() if before[3].get(k) != after[3].get(k)}
    assert before[:3] == after[:3], f"default dtype, threads or grad mode leaked: {before[:3]} -> {after[:3]}"
    assert not changed, f"environment variables leaked: {sorted(changed)}"
    assert _printed_to() is file, f"rich's console prints to {_printed_to()!r} from now on"


@pytest.fixture(params=SEEDED_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend whose draws are named by a key; skipped with its own reason where it cannot run."""
    state = backend_report()[request.param]
    if state != "available":
        pytest.skip(f"needs backend {request.param!r}: {state}")
    return request.param
