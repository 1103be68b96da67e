"""Keys of activation and error rounding: one step per forward call, one stream per cast within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lightning_lpsgld.random import DrawKey, Role, derive_seed, stream_id

__all__ = ["CallDraws", "ForwardCounter", "Rounding"]

Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class CallDraws:
    """Draws of one forward call.

    Attributes:
        seed: Private to the rank.
        step: Number of the call.
        rounding: Of the activations in this call; errors are always rounded stochastically.
    """

    seed: int
    step: int
    rounding: Rounding

    def activation_key(self, index: int) -> DrawKey:
        """Key of the activation of cast number ``index`` of the call."""
        return DrawKey(self.seed, self.step, stream_id(Role.ACTIVATION, index))

    def error_key(self, index: int) -> DrawKey:
        """Key of the error that comes back to cast number ``index`` of the call."""
        return DrawKey(self.seed, self.step, stream_id(Role.ERROR, index))


class ForwardCounter:
    """Counts forward calls, so that no key is ever used twice and a resumed run goes on where it stopped.

    Training calls count up for ever. Evaluation calls have seeds of their own, derived from the number of training
    calls so far, and a counter that starts at zero after each training call: evaluating does not change training.

    Args:
        seed: The run's seed.
        rank: Each rank has draws of its own.
        eval_rounding: Rounding of activations outside training.
    """

    def __init__(self, seed: int, rank: int, eval_rounding: Rounding) -> None:
        self.rank = rank
        self.reseed(seed)
        self.eval_rounding = eval_rounding
        self.forwards = 0
        self.evaluations = 0

    def reseed(self, seed: int) -> None:
        """Draw from another run's seed."""
        self.seed = seed
        self.training_seed = derive_seed(seed, "rank", self.rank)

    def open(self, training: bool) -> CallDraws:
        """Draws of the next call."""
        if training:
            draws = CallDraws(self.training_seed, self.forwards, "stochastic")
            self.forwards += 1
            self.evaluations = 0
            return draws
        draws = CallDraws(derive_seed(self.training_seed, "eval", self.forwards), self.evaluations, self.eval_rounding)
        self.evaluations += 1
        return draws

    def state_dict(self) -> dict[str, Any]:
        """The run's seed (the same on every rank) and both counters."""
        return {"seed": self.seed, "forwards": self.forwards, "evaluations": self.evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.reseed(int(state["seed"]))
        self.forwards, self.evaluations = int(state["forwards"]), int(state["evaluations"])
