"""Short chains that are driven over powers of two, and how far two backends agree on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.samplers import SGHMC, SGLD, PreconditionedSGLD

__all__ = ["BOUNDARIES", "DRIVEN", "TOPS", "check_crossings"]

#: Powers of two of both signs, below and above one, that chains are taken over.
BOUNDARIES = (1.0, -2.0, 0.25, 0.5)
#: Format, shape of a parameter, and its elements over the boundary; the first is the largest of its block.
TOPS = {
    "bfp8": ((24,), (1.0,)),
    "bfp8 rows": ((24, 3), (1.0, 0.6, -0.3)),
    "bfp8b4": ((24, 8), (1.0, 0.6, -0.3, 0.8)),
    "mxint8": ((24, 2), (1.0, -0.3)),
    "bfp8-tensor": ((4, 3), (1.0, 0.6, -0.3)),
}
#: Sampler, options, and step size over b^2/400 (of preconditioned SGLD: over |b|): drifts of a fraction of a gap.
DRIVEN: dict[str, tuple[Any, dict[str, Any], float]] = {
    "vc": (SGLD, {}, 0.02),
    "naive": (SGLD, {"variance_corrected": False}, 0.02),
    "full": (SGLD, {"accumulator": "full"}, 0.02),
    "sghmc": (SGHMC, {"friction": 10.0}, 12.0),
    "sghmc naive": (SGHMC, {"friction": 10.0, "variance_corrected": False}, 12.0),
    "psgld": (PreconditionedSGLD, {}, 2e-3),
    "psgld naive": (PreconditionedSGLD, {"variance_corrected": False}, 2e-3),
}


def _states(case: str, block: str, temperature: float, backend: str, device: str, steps: int) -> Tensor:
    """All parameters over their boundary after each step, shape (steps, elements); they start at the top code."""
    sampler, options, lr = DRIVEN[case]
    shape, relative = TOPS[block]
    pattern = torch.tensor(relative).repeat(max(shape[-1] // len(relative), 1) if len(shape) > 1 else 1)
    groups, centres = [], []
    for b in BOUNDARIES:
        centre = (b * pattern).expand(shape).to(device)
        step = lr * abs(b) if sampler is PreconditionedSGLD else lr * b * b / 400
        groups.append({"params": [torch.nn.Parameter(127 / 128 * centre)], "lr": step})
        centres.append(centre)
    opt = sampler(groups, lr=1e-3, num_data=1, temperature=temperature, seed=11, backend=backend,
                  weight_format=block.split()[0], **options)  # fmt: skip
    seen = []
    for _ in range(steps):
        for group, centre, b in zip(opt.param_groups, centres, BOUNDARIES):
            param = group["params"][0]
            param.grad = 400.0 / b**2 * (param.detach() - 1.2 * centre)
        opt.step()
        ends = [group["params"][0].detach().flatten() / b for group, b in zip(opt.param_groups, BOUNDARIES)]
        seen.append(torch.cat(ends))
    return torch.stack(seen)


def check_crossings(
    case: str, block: str, temperature: float, backend: str, *, device: str = "cpu", steps: int = 10, share: float
) -> None:
    """Chains from the top code to 1.2 times the boundary are the reference's, over every boundary, step by step.

    Args:
        case: Of :data:`DRIVEN`.
        block: Of :data:`TOPS`.
        temperature: Of the chain.
        backend: Compared with the reference on the CPU.
        device: Where its tensors lie.
        steps: Of each chain.
        share: Of states that may differ: draws that fall between a float32 and a float64 threshold, and what follows.

    Raises:
        AssertionError: If more differ, or if a boundary was not passed.
    """
    theirs = _states(case, block, temperature, "reference", "cpu", steps)
    if backend != "reference":
        ours = _states(case, block, temperature, backend, device, steps).cpu()
        differing = float((ours != theirs).double().mean())
        assert differing <= share, f"{case}, {block}, T = {temperature:g}: {differing:.2%} of the states differ"
    over = (theirs >= 1.0).any(0).reshape(len(BOUNDARIES), -1).any(1)
    assert bool(over.all()), f"{case}, {block}, T = {temperature:g}: not passed: {over.logical_not().tolist()}"
