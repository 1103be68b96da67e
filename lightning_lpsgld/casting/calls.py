"""Which forward call is running: the stack of hooked modules, the call that the outermost opened, and its repetitions.

Nothing is cast here; what happens when a module is entered or left is decided in ``session``.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lpsgld.casting.draws import CallDraws, Rounding
from lightning_lpsgld.casting.outputs import Place

__all__ = ["CallStack", "ForwardCall", "Frame", "Scope", "in_backward", "is_redirected", "warn_if_bypassed"]

#: What a hooked module is: a place whose output is cast, a module that holds such places, or one left alone.
Scope = Literal["layer", "activation", "container", "excluded"]


class Frame:
    """One hooked module that is running."""

    __slots__ = ("activation", "counted", "name", "opened", "scope")

    def __init__(self, name: str, scope: Scope) -> None:
        self.name, self.scope = name, scope
        self.opened = False  # whether this is the outermost module of a forward call
        self.counted = True  # False for Lightning's redirected root: its "forward" is the whole training step
        self.activation: Any = None  # what the function inside an activation module gave

    def made(self, output: Any) -> Any:
        """How ``output`` came about, if it is what the function inside gave."""
        return self.activation if self.activation is not None and self.activation.result is output else None


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
        inputs: Where in memory its arguments lie, if anyone asks for codes.
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
    inputs: frozenset[int] = frozenset()

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


class CallStack:
    """The hooked modules that are running, and the forward call that they belong to.

    Attributes:
        call: The call that is running, ``None`` between calls.
        last: The last call that was opened outside of a compiled graph.
        frames: Modules from the outermost to the innermost.
        entries: Of each module, draws and number of the next cast at each entry in training: where a repetition of its
            forward in backward has to begin.
    """

    def __init__(self) -> None:
        self.call: ForwardCall | None = None
        self.last: ForwardCall | None = None
        self.frames: list[Frame] = []
        self.entries: dict[str, list[tuple[CallDraws, int]]] = {}

    @property
    def learning(self) -> bool:
        """Whether the call that is running finds the network's outputs."""
        return self.call is not None and self.call.learning

    @property
    def scope(self) -> Scope | None:
        """What the innermost module is."""
        return self.frames[-1].scope if self.frames else None

    def runs(self, name: str) -> bool:
        """Whether a module is running."""
        return any(frame.name == name for frame in self.frames)

    def unwind(self, name: str) -> bool:
        """Drop what a forward that raised has left: the module that is entered now cannot be running already.

        Returns:
            Whether the call that was running is over.
        """
        for at, frame in enumerate(self.frames):
            if frame.name == name and frame.counted:
                over = any(later.opened for later in self.frames[at:])
                if over:
                    self.call = None
                del self.frames[at:]
                return over
        return False

    def pop(self, name: str) -> Frame:
        """Take off the innermost frame of a module, and what a module below it that raised has left."""
        while self.frames[-1].name != name:
            self.frames.pop()
        return self.frames.pop()

    def note_entry(self, name: str) -> None:
        """Remember where the draws of a module begin, in case its forward is repeated in backward."""
        call = self.call
        if call is not None and call.training and not call.replay:
            self.entries.setdefault(name, []).append((call.draws, call.index))

    def end(self) -> None:
        """Forget what is running."""
        self.call = None
        self.frames.clear()


def in_backward() -> bool:
    """Whether a forward that runs now is the repetition of another (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


def is_redirected(module: nn.Module) -> bool:
    """Whether ``forward`` is not the class's own: Lightning's strategies route a whole training step through it."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    compiled = getattr(forward, "_torchdynamo_orig_callable", forward)  # Lightning compiles steps and forward, each
    return getattr(compiled, "__func__", None) is not type(module).forward


def warn_if_bypassed(root: nn.Module | None, module: nn.Module) -> None:
    """Say so if ``root.forward`` is running although ``root`` was not called: its hooks were passed by."""
    code = getattr(getattr(type(root), "forward", None), "__code__", None)
    frame = sys._getframe(1)
    while root is not None and root is not module and code is not None and frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is code:
            warnings.warn(
                f"`self.forward(...)` of {type(root).__name__} was called directly, which passes hooks by: activations "
                "that it calls as functions are rounded only where they go into a submodule at once, and each "
                "submodule counts as a network of its own. Call `self(...)` instead.",
                stacklevel=2,
            )
            return
