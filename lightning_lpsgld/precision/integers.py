"""The forward passes of a trainer in integers: opened with the casts, closed with them, entered around each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.nn import Module

from lightning_lpsgld.arithmetic import Arithmetic, LayerArithmetic, capability, summary
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
        self._said: dict[str, str] | None = None

    def open(self, module: Module) -> None:
        """Let the casts of a module carry codes."""
        self.close()
        if self.arithmetic == "simulated":
            return
        codes_of = self._stack.enter_context(carried_codes(module))
        assert codes_of is not None, "opened before the casts were put on"
        self._said = None
        self.layers = LayerArithmetic(module, codes_of, self.arithmetic)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a step."""
        with nullcontext() if self.layers is None else self.layers.running():
            yield

    def report(self) -> dict[str, str]:
        """Layer -> ``"integer"``, or why it was simulated."""
        return {} if self.layers is None else self.layers.report()

    def describe(self) -> str:
        """Line of the posterior card: how the products of a training step run."""
        if self.arithmetic == "simulated":
            return "simulated: products of floats, all of values on the grids"
        if not self.report():
            return f"{self.arithmetic} ({capability()}): layers are counted when the first step has run"
        return f"{self.arithmetic} ({capability()}): forward {summary(self.report())}; backward in floats, all layers"

    def say(self, *, again: bool = False) -> bool:
        """Log how the layers ran, once; again only if that has changed.

        Returns:
            Whether there was something to say.
        """
        report = self.report()
        if not report or report == self._said or (self._said is not None and not again):
            return False
        rank_zero_info(f"LowPrecisionSGLD: {summary(report)}.")
        self._said = report
        return True

    def close(self) -> None:
        """Let go of the module, and say how its layers ran, if that has not been said; the report stays."""
        self.say(again=True)
        self._stack.close()
