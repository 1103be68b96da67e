"""Hooks and functional activations while ``torch.compile`` traces them: the same casts, each a node of the graph.

A graph is made once and run many times, so nothing here depends on the step: the counter and the keys are tensors, and
what a cast draws follows from the key's values when the graph runs. Only calls whose outputs are known get here.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_lpsgld.casting.call import ForwardCall
from lightning_lpsgld.casting.draws import open_forward
from lightning_lpsgld.casting.functional import ACTIVATION_NAMES, is_inplace
from lightning_lpsgld.casting.hooks import Frame, Scope
from lightning_lpsgld.ops.autograd import cast_node
from lightning_lpsgld.random import Role, stream_id

if TYPE_CHECKING:
    from lightning_lpsgld.casting.runtime import CastingRuntime

__all__ = ["Report", "enter", "is_running", "leave", "on_activation"]

_OWN = ("traced.py", "runtime.py", "functional.py")
#: Files whose functions stand between a node of a graph and the handler of a torch-function mode.
_BETWEEN = (*(str(Path(__file__).with_name(name)) for name in _OWN), F.__file__, torch.overrides.__file__)


class Report:
    """What compiled graphs leave out; set while they are traced, said once when the forward has ended.

    Attributes:
        expected: Casts of the forward that found the network's outputs, by owner and mode.
        missed: Activation functions among them that the last incomplete graph has no cast for.
        codes: Whether a graph should have kept codes for backward.
    """

    def __init__(self) -> None:
        self.expected: dict[tuple[str, bool], dict[str, int]] = {}
        self.missed: tuple[str, ...] = ()
        self.codes = False
        self._said: set[str] = set()

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


def is_running() -> bool:
    """Whether the function that was called is a node of a compiled graph, run as Python (``backend="eager"``)."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in _BETWEEN:
        frame = frame.f_back
    caller = frame.f_back
    if caller is None or not frame.f_code.co_filename.startswith("<eval_with_key>"):
        return False
    return caller.f_code.co_filename.endswith("eval_frame.py")  # else a graph module of the user's


def enter(runtime: CastingRuntime, name: str, scope: Scope, module: nn.Module) -> None:
    """Forward pre-hook."""
    runtime._unwind(name)
    frame = Frame(name, scope)
    if runtime.call is None and scope != "excluded":  # a redirected forward is outside of what it leads to
        frame.opened = True
        training = runtime._training(module)
        key = open_forward(runtime.counter.state, training)
        runtime.call = ForwardCall(name, training, runtime.counter.rounding(training), None, key)
    runtime.stack.append(frame)


def leave(runtime: CastingRuntime, name: str, scope: Scope, module: nn.Module, output: Any) -> Any:
    """Forward hook; returns the output, cast where it is a site."""
    while runtime.stack[-1].name != name:
        runtime.stack.pop()
    frame = runtime.stack.pop()
    if scope == "activation" and torch.is_tensor(output):
        output = _cast(runtime, name, output)
    elif scope == "layer":
        output = _cast_layer(runtime, name, module, output)
    if frame.opened:
        _close(runtime)
    return output


def _close(runtime: CastingRuntime) -> None:
    call, report = runtime.call, runtime.report
    assert call is not None
    expected = report.expected.get((call.owner, call.training), {})
    missed = [site for site in runtime.functional_sites if site in expected and site not in call.reached]
    if missed:
        report.missed = tuple(missed)
    if runtime.packing:
        report.codes = True
    runtime.call = None


def on_activation(runtime: CastingRuntime, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called instead of an activation function; a cast follows where no module's does."""
    x = args[0] if args else kwargs.get("input")
    frame = runtime.stack[-1] if runtime.stack else None
    if frame is None or frame.scope != "container" or runtime.call is None or runtime.muted or not torch.is_tensor(x):
        return func(*args, **kwargs)
    site = f"{frame.name}:{ACTIVATION_NAMES[func]}".lstrip(":")
    if not is_inplace(func, args, kwargs):
        return _cast(runtime, site, func(*args, **kwargs))
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    return x.copy_(_cast(runtime, site, func(x.clone(), *args[1:], **rest)))


def _cast_layer(runtime: CastingRuntime, name: str, module: nn.Module, output: Any) -> Any:
    if isinstance(module, nn.MultiheadAttention):
        return (_cast(runtime, name, output[0]), *output[1:])
    if isinstance(output, PackedSequence):
        return output._replace(data=_cast(runtime, name, output.data))
    if isinstance(output, tuple):
        return tuple(_cast_layer(runtime, name, module, part) for part in output)
    return _cast(runtime, name, output) if torch.is_tensor(output) else output


def _cast(runtime: CastingRuntime, site: str, raw: Tensor) -> Tensor:
    """The result of a site, cast unless it is the network's output."""
    call = runtime.call
    if call is None or not raw.is_floating_point() or raw.is_nested or raw.is_sparse or raw.numel() == 0:
        return raw
    index, place = call.next_index(), call.place(site)
    if place in runtime.tracker.places or (call.replay and runtime.tracker.is_output(site)):
        return raw
    activations, errors = runtime.activations, runtime.errors
    return cast_node(
        raw,
        call.key,
        None if activations is None else str(activations),
        stream_id(Role.ACTIVATION, index),
        None if errors is None else str(errors),
        stream_id(Role.ERROR, index),
        call.rounding,
        runtime.backend,
    )
