"""What was exported: how large, how exact, how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Export", "median_seconds"]

_REPEATS = 9


def median_seconds(run: Callable[[], Any]) -> float:
    """Median time of a few calls, after one that is not counted."""
    run()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[_REPEATS // 2]


@dataclass(frozen=True)
class Export:
    """Result of an export; ``print`` shows it.

    Attributes:
        path: The file.
        samples: K.
        bytes: Its size.
        bytes_fp32: Size of K such files of one float32 network each.
        difference: Largest difference of an output from PyTorch's, by the name of the output.
        points: Inputs that it was checked on.
        seconds: Median time of a call with these inputs.
        seconds_fp32: K times that of one float32 network.
        versions: Versions and opset.
    """

    path: Path
    samples: int
    bytes: int
    bytes_fp32: int
    difference: Mapping[str, float]
    points: int
    seconds: float
    seconds_fp32: float
    versions: str

    @property
    def largest_difference(self) -> float:
        """Over all outputs."""
        return max(self.difference.values())

    def __str__(self) -> str:
        each = 1e3 / (self.points * self.samples)
        differences = ", ".join(f"{name} {value:.2g}" for name, value in self.difference.items())
        return "\n".join(
            [
                f"{self.path}: {self.samples} samples, {self.bytes} bytes, "
                f"{self.bytes / self.bytes_fp32:.3f} of {self.samples} float32 files ({self.bytes_fp32} bytes)",
                f"largest difference from PyTorch on {self.points} inputs: {differences}",
                f"latency {self.seconds * each:.4g} ms a sample and input, float32 {self.seconds_fp32 * each:.4g} ms "
                f"({self.seconds / self.seconds_fp32:.2f} times)",
                self.versions,
            ]
        )
