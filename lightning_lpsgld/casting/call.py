"""One forward call, and one call of an activation function within it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_lpsgld.casting.draws import CallDraws, Rounding
from lightning_lpsgld.casting.functional import ACTIVATION_NAMES, RANDOM_FUNCTIONS, RELU_FUNCTIONS, is_inplace
from lightning_lpsgld.casting.outputs import Place

__all__ = ["ActivationFunction", "ForwardCall"]


@dataclass
class ForwardCall:
    """One call of an outermost module.

    Attributes:
        owner: Name of the module.
        training: Whether it draws from the training stream.
        rounding: Of its activations.
        known: Its keys, ``None`` if a compiled graph opened it and no one asked yet.
        key: The same as a tensor for compiled graphs, ``None`` where nothing is compiled.
        index: Number of the next cast.
        learning: Whether the places of the network's output are still to be found.
        replay: Whether this repeats an earlier call, during backward.
        reached: How often each site was reached.
    """

    owner: str
    training: bool
    rounding: Rounding
    known: CallDraws | None
    key: Tensor | None
    index: int = 0
    learning: bool = False
    replay: bool = False
    reached: dict[str, int] = field(default_factory=dict)

    @property
    def draws(self) -> CallDraws:
        """Its keys."""
        if self.known is None:
            assert self.key is not None
            seed, step = self.key.tolist()
            self.known = CallDraws(seed % 2**64, step, self.rounding)
        return self.known

    def place(self, site: str) -> Place:
        """This visit of a site."""
        times = self.reached.get(site, 0)
        self.reached[site] = times + 1
        return (self.owner, site, times)

    def next_index(self) -> int:
        """Number of this cast."""
        self.index += 1
        return self.index - 1


@dataclass(frozen=True)
class ActivationFunction:
    """An activation function with everything but its first argument."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        """Call the function on ``x``."""
        out: Tensor = self.func(x, *self.args, **self.kwargs)
        return out

    @property
    def name(self) -> str:
        """Name of the function, without the underscore of an in-place form."""
        return ACTIVATION_NAMES[self.func]

    @property
    def inplace(self) -> bool:
        """Whether the call overwrites its argument."""
        return is_inplace(self.func, (None, *self.args), self.kwargs)

    @property
    def is_relu(self) -> bool:
        """Whether backward asks only for signs."""
        return self.func in RELU_FUNCTIONS

    @property
    def repeatable(self) -> bool:
        """Whether a second call gives the same; else it is never made."""
        return self.func not in RANDOM_FUNCTIONS
