"""Real processes for tests: ranks that talk over gloo, and a run that can be killed.

They are forked from a server that has imported torch and Lightning once, so that a process costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["free_port", "run_ranks", "start"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "lightning_lpsgld"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(function: Callable[..., Any], result: Path, environment: dict[str, str], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        outcome = ("returned", function(*args))
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    torch.save(outcome, result.with_suffix(".part"))
    result.with_suffix(".part").rename(result)
    os._exit(0)  # a rank whose peers have failed would wait for them at exit


def start(function: Callable[..., Any], *args: Any, result: Path, environment: dict[str, str] | None = None) -> Any:
    """Process that runs ``function(*args)`` and leaves ``("returned", value)`` or ``("raised", text)`` in a file."""
    process = _CONTEXT.Process(target=_enter, args=(function, Path(result), environment or {}, args), daemon=True)
    process.start()
    return process


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "GROUP_RANK": "0",
    }  # fmt: skip


def run_ranks(function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 240) -> list[Any]:
    """What ``function(*args)`` returns on each rank of a gloo group that Lightning (or the function) will set up.

    Raises:
        AssertionError: If a rank raises, dies or does not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        files = [Path(folder) / f"rank{rank}.pt" for rank in range(world)]
        processes = [
            start(function, *args, result=file, environment=rank_environment(rank, world, port))
            for rank, file in enumerate(files)
        ]
        end = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
        outcomes = [torch.load(f, weights_only=False) if f.exists() else ("died or hung", None) for f in files]
    assert all(kind == "returned" for kind, _ in outcomes), "\n".join(f"{kind}: {value}" for kind, value in outcomes)
    return [value for _, value in outcomes]
