"""What a sampler does not follow of the optimizer that it takes over."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import Optimizer

__all__ = ["IGNORED_OPTIONS", "report_ignored"]

log = logging.getLogger(__name__)

#: Options of torch's optimizers that a sampler does not follow, and the values at which they change nothing.
IGNORED_OPTIONS: dict[str, Any] = {
    "momentum": 0, "dampening": 0, "nesterov": False, "betas": None, "amsgrad": False, "alpha": None, "rho": None,
    "lr_decay": 0, "etas": None, "lambd": None, "centered": False, "momentum_decay": None,
}  # fmt: skip


def report_ignored(owner: str, optimizer: Optimizer) -> None:
    """Name, in the log, the options of an optimizer that have an effect there and none on a sampler."""
    plain = {"SGD": {}, "Adam": {"betas"}, "AdamW": {"betas"}}
    names = set(plain.get(type(optimizer).__name__, {}))
    for group in optimizer.param_groups:
        names |= {k for k, neutral in IGNORED_OPTIONS.items() if k in group and group[k] not in (neutral, None)}
    if names:
        kind = type(optimizer).__name__
        log.warning(
            "%s takes lr and weight_decay from %s and does not use its %s: the update is a Langevin step, so a "
            "learning rate tuned for %s may need another value.", owner, kind, ", ".join(sorted(names)), kind,
        )  # fmt: skip
