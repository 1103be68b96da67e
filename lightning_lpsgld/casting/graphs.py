"""How casts get into graphs of ``torch.compile``: what runs outside of a graph, and what a graph leaves out.

A graph is made once and run many times, so nothing that is traced may depend on the step: the counter and the keys are
tensors, and what a cast draws follows from the key's values when the graph runs. Where the network's outputs are still
to be found, the graph breaks and the session runs as it is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lpsgld.casting.calls import ForwardCall

__all__ = ["GraphSide", "is_running"]

_OWN = ("graphs.py", "session.py", "hooks.py")
#: Files whose functions stand between a node of a graph and the handler of a torch-function mode.
_BETWEEN = (*(str(Path(__file__).with_name(name)) for name in _OWN), F.__file__, torch.overrides.__file__)


def is_running() -> bool:
    """Whether the function that was called is a node of a compiled graph, run as Python (``backend="eager"``)."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in _BETWEEN:
        frame = frame.f_back
    caller = frame.f_back
    if caller is None or not frame.f_code.co_filename.startswith("<eval_with_key>"):
        return False
    return caller.f_code.co_filename.endswith("eval_frame.py")  # else a graph module of the user's


class GraphSide:
    """What a session needs where something is compiled.

    What graphs leave out is noted while they are traced and said once, when the forward has ended.

    Attributes:
        shielded: Functions that the compiler does not look into, by name; ``None`` while nothing compiles.
        expected: Casts of the forward that found the network's outputs, by owner and mode.
        missed: Activation functions among them that the last incomplete graph has no cast for.
        codes: Whether a graph should have kept codes for backward.
    """

    def __init__(self) -> None:
        self.shielded: dict[str, Callable[..., Any]] | None = None
        self.expected: dict[tuple[str, bool], dict[str, int]] = {}
        self.missed: tuple[str, ...] = ()
        self.codes = False
        self._said: set[str] = set()

    def shield(self, functions: dict[str, Callable[..., Any]]) -> None:
        """Get ready, if whatever compiles has been imported; importing it takes seconds."""
        if self.shielded is None and "torch._dynamo" in sys.modules:
            self.shielded = {name: torch.compiler.disable(function) for name, function in functions.items()}

    def outside(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, the one shielded as ``name``, to be run outside of the graph."""
        return function if self.shielded is None else self.shielded[name]

    def open(self, counter: Tensor, training: bool) -> Tensor:
        """Begin a forward call in a graph that is traced: the key's node, which counts when the graph runs."""
        from lightning_lpsgld.casting.nodes import open_forward  # registers an operator

        key: Tensor = open_forward(counter, training)
        return key

    def note(self, call: ForwardCall, functional_sites: dict[str, None], packing: bool) -> None:
        """Compare a traced call with the forward that found the outputs."""
        expected = self.expected.get((call.owner, call.training), {})
        missed = [site for site in functional_sites if site in expected and site not in call.reached]
        if missed:
            self.missed = tuple(missed)
        if packing:
            self.codes = True

    def say(self) -> None:
        """Warn of what has not been warned of yet."""
        names = [name for name in self.missed if name not in self._said]
        if names:
            warnings.warn(
                f"Activations called as functions are not cast in a compiled graph: {', '.join(names)}. torch.compile "
                "hides torch.nn.functional.tanh, sigmoid, hardsigmoid and hardswish and in-place functions of torch "
                "(torch.relu_); use modules (nn.Tanh), torch.tanh or Tensor methods.",
                stacklevel=5,
            )
        if self.codes and "codes" not in self._said:
            names.append("codes")
            warnings.warn(
                "saved_activations='codes' has no effect inside a compiled graph: what it saves for backward takes "
                "the memory of saved_activations='full'. Results are the same.",
                stacklevel=5,
            )
        self._said.update(names)
