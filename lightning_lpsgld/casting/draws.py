"""Keys of activation and error rounding: one step per forward call, one stream per cast within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lpsgld.random import DrawKey, Role, derive_seed, stream_id

__all__ = ["CallDraws", "ForwardCounter", "Rounding", "advance"]

#: How activations and errors are rounded.
Rounding = Literal["nearest", "stochastic"]


def _signed(seed: int) -> int:
    """The seed as an int64 in two's complement."""
    return seed - 2**64 if seed >= 2**63 else seed


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

    @property
    def tensor(self) -> Tensor:
        """Seed (signed) and step as a graph's key has them."""
        return torch.tensor((_signed(self.seed), self.step), dtype=torch.int64)

    def activation_key(self, index: int) -> DrawKey:
        """Key of the activation of cast number ``index`` of the call."""
        return DrawKey(self.seed, self.step, stream_id(Role.ACTIVATION, index))

    def error_key(self, index: int) -> DrawKey:
        """Key of the error that comes back to cast number ``index`` of the call."""
        return DrawKey(self.seed, self.step, stream_id(Role.ERROR, index))


def advance(state: Tensor, training: bool) -> tuple[int, int]:
    """Seed (signed) and step of the next call; counts it."""
    seed, forwards, evaluations = state.tolist()
    if training:
        state[1], state[2] = forwards + 1, 0
        return seed, forwards
    state[2] = evaluations + 1
    return _signed(derive_seed(seed, "eval", forwards)), evaluations


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
        self.rank, self.eval_rounding = rank, eval_rounding
        with torch.inference_mode(False):  # or it could not be counted up outside of inference mode
            #: Seed of this rank (signed), training calls so far, other calls since. A tensor, because compiled graphs
            #: count too; on the CPU, so that reading it waits for no device.
            self.state = torch.zeros(3, dtype=torch.int64)
        self.reseed(seed)

    def __getstate__(self) -> dict[str, Any]:
        return {"rank": self.rank, "eval_rounding": self.eval_rounding, **self.state_dict()}  # no memory is shared

    def __setstate__(self, state: dict[str, Any]) -> None:
        ForwardCounter.__init__(self, state["seed"], state["rank"], state["eval_rounding"])
        self.load_state_dict(state)

    def reseed(self, seed: int) -> None:
        """Draw from another run's seed."""
        self.seed = seed
        self.state[0] = _signed(derive_seed(seed, "rank", self.rank))

    def open(self, training: bool) -> CallDraws:
        """Draws of the next call."""
        seed, step = advance(self.state, training)
        return CallDraws(seed % 2**64, step, self.rounding(training))

    def rounding(self, training: bool) -> Rounding:
        """How activations are rounded in a call."""
        return "stochastic" if training else self.eval_rounding

    def state_dict(self) -> dict[str, Any]:
        """The run's seed (the same on every rank) and both counters."""
        _, forwards, evaluations = self.state.tolist()
        return {"seed": self.seed, "forwards": forwards, "evaluations": evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.reseed(int(state["seed"]))
        self.state[1], self.state[2] = int(state["forwards"]), int(state["evaluations"])
