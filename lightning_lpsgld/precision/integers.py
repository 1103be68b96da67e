"""The forward passes of a trainer in integers: opened with the casts, closed with them, entered around each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.nn import Module

from lightning_lpsgld.arithmetic import Arithmetic, LayerArithmetic, summary
from lightning_lpsgld.casting import carried_codes

__all__ = ["IntegerForward"]


class IntegerForward:
    """Holds a :class:`~lightning_lpsgld.arithmetic.LayerArithmetic` as long as a module is cast.

    Args:
        arithmetic: With ``"simulated"`` nothing is done.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic
        self.layers: LayerArithmetic | None = None
        self._stack = ExitStack()
        self._said = False

    def open(self, module: Module) -> None:
        """Let the casts of a module carry codes."""
        self.close()
        if self.arithmetic == "simulated":
            return
        codes_of = self._stack.enter_context(carried_codes(module))
        assert codes_of is not None, "opened before the casts were put on"
        self._said = False
        self.layers = LayerArithmetic(module, codes_of, self.arithmetic)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a step."""
        with nullcontext() if self.layers is None else self.layers.running():
            yield

    def report(self) -> dict[str, str]:
        """Layer -> ``"integer"``, or why it was simulated."""
        return {} if self.layers is None else self.layers.report()

    def close(self) -> None:
        """Let go of the module, and say how its layers ran; the report stays."""
        if self.layers is not None and not self._said and self.report():
            rank_zero_info(f"LowPrecisionSGLD: {summary(self.report())}.")
            self._said = True
        self._stack.close()
