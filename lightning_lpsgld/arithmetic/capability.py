"""What this machine can multiply, and the environment variable that takes some of it away.

``LIGHTNING_LPSGLD_ARITHMETIC``: a comma-separated list of ``no-onednn`` (no integer kernels) and ``no-vnni`` (as on a
processor whose 8-bit products pass through 16-bit sums). It only takes away: every path can be forced and tested on any
machine, and none can be claimed that is not there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

__all__ = ["VARIABLE", "Capability", "capability"]

#: Environment variable that takes instruction sets away, for tests of the other paths.
VARIABLE = "LIGHTNING_LPSGLD_ARITHMETIC"
_MASKS = ("no-onednn", "no-vnni")


@dataclass(frozen=True)
class Capability:
    """What products of codes can run on.

    Attributes:
        instructions: Instruction set of torch's CPU kernels, for display.
        onednn: Whether oneDNN's kernels of unsigned by signed bytes are there.
        vnni: Whether they add products of bytes in 32 bits at once (AVX-512 VNNI, AVX-VNNI, AMX). Without it two
            products are added in 16 bits, which saturate, first.
    """

    instructions: str
    onednn: bool
    vnni: bool

    def __str__(self) -> str:
        kernels = "no integer kernels" if not self.onednn else "integers, 32-bit sums" if self.vnni else "integers"
        return f"{self.instructions}: {kernels}"


def capability() -> Capability:
    """What this machine can do, less what the environment variable takes away.

    Raises:
        ValueError: If the variable holds something else.

    Example:
        >>> isinstance(capability().onednn, bool)
        True
    """
    masked = [word.strip() for word in os.environ.get(VARIABLE, "").split(",") if word.strip()]
    unknown = [word for word in masked if word not in _MASKS]
    if unknown:
        raise ValueError(f"{VARIABLE} must be a comma-separated list of {', '.join(_MASKS)}, got {unknown[0]!r}.")
    instructions = torch.backends.cpu.get_cpu_capability()
    x86 = instructions.startswith("AVX")
    onednn = x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")
    checks = ("_is_vnni_supported", "_is_avx512_vnni_supported", "_is_amx_tile_supported")
    vnni = any(getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name))
    return Capability(instructions, onednn and "no-onednn" not in masked, vnni and "no-vnni" not in masked)
