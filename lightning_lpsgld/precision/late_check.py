"""On an accelerator a NaN is known one step late: it is asked for before anything keeps the weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_lpsgld.samplers import LangevinOptimizer

__all__ = ["SettleBeforeSaving", "settle_at_end"]


class SettleBeforeSaving:
    """Hook of a module: before its ``state_dict`` is taken, the finite checks of its samplers are read.

    Every checkpoint goes through ``state_dict``, also one of weights only, for which no optimizer is asked. A copy of
    the module shares the hook, and a pickled one has one that does nothing.

    Args:
        samplers: Gives the samplers of the running fit.
    """

    def __init__(self, samplers: Callable[[], Sequence[LangevinOptimizer]]) -> None:
        self._samplers = samplers
        self._handle: Any = None

    def attach(self, module: pl.LightningModule) -> None:
        """Watch a module; another one no longer."""
        self.remove()
        self._handle = module.register_state_dict_pre_hook(self)

    def remove(self) -> None:
        """Watch no module."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, module: Any, prefix: str, keep_vars: bool) -> None:
        """Read the checks.

        Raises:
            FloatingPointError: As :meth:`LangevinOptimizer.settle`.
        """
        for sampler in self._samplers():
            sampler.settle()

    def __deepcopy__(self, memo: Any) -> SettleBeforeSaving:
        return self

    def __reduce__(self) -> Any:
        return SettleBeforeSaving, (tuple,)


def settle_at_end(samplers: Sequence[LangevinOptimizer]) -> None:
    """Read the check of a fit's last step, unless the fit is ending with an error already.

    Raises:
        FloatingPointError: As :meth:`LangevinOptimizer.settle`.
    """
    if sys.exc_info()[0] is None:
        for sampler in samplers:
            if sampler.unsettled:
                sampler.settle()
