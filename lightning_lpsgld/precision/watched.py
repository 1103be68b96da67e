"""The module between the plugin's hooks: on which device it is, and whether its training ever steps a sampler."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch.nn import Module

from lightning_lpsgld.samplers import LangevinOptimizer

__all__ = ["WatchedModule"]

#: Steps' worth of batches after which a module with manual optimization must have stepped the sampler at least once.
_PATIENCE = 64


class WatchedModule:
    """A module that is held weakly, and the batches it was trained on without a step.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(2, 1)
        >>> WatchedModule(module).device_type, WatchedModule().device_type
        ('cpu', 'cpu')
    """

    def __init__(self, module: Module | None = None) -> None:
        self._module = None if module is None else weakref.ref(module)
        self._unstepped = 0

    @property
    def device_type(self) -> str:
        """Of the first parameter as it is now; also where nothing was fitted."""
        module = None if self._module is None else self._module()
        first = None if module is None else next(module.parameters(), None)
        return "cpu" if first is None else first.device.type

    @property
    def _batches_a_step(self) -> int:
        """As the Trainer accumulates now; a scheduler may change it during the run."""
        trainer = getattr(None if self._module is None else self._module(), "_trainer", None)
        return 1 if trainer is None else int(trainer.accumulate_grad_batches)

    def restart(self) -> None:
        """A fit begins."""
        self._unstepped = 0

    def trained(self, samplers: Sequence[LangevinOptimizer]) -> None:
        """One more batch was trained on."""
        stepped = not samplers or any(s.steps > 0 for s in samplers)
        self._unstepped = 0 if stepped else self._unstepped + 1

    def refuse_unstepped(self) -> None:
        """Before a batch.

        Raises:
            RuntimeError: If batches for many steps were trained on and no sampler was stepped.
        """
        if self._unstepped >= _PATIENCE * self._batches_a_step:
            raise RuntimeError(
                f"LowPrecisionSGLD: {self._unstepped} batches were trained on, but the sampler was never stepped. With "
                "manual optimization, step what `self.optimizers()` returns, not an optimizer kept elsewhere."
            )
