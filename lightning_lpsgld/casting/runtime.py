"""What happens while a hooked module runs: which forward call this is, and what is cast in it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_lpsgld.casting import traced
from lightning_lpsgld.casting.call import ActivationFunction, ForwardCall
from lightning_lpsgld.casting.draws import CallDraws, ForwardCounter
from lightning_lpsgld.casting.functional import SOFTMAX_FUNCTIONS
from lightning_lpsgld.casting.hooks import Frame, Scope, is_redirected
from lightning_lpsgld.casting.outputs import Held, OpenEnds, OutputTracker, Place, replace_tensors, tensors_in
from lightning_lpsgld.casting.saved import CodeStore, ReluSigns
from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.autograd import Rounder, cast_with
from lightning_lpsgld.ops.dispatch import BackendName

__all__ = ["CastingRuntime"]


@dataclass
class _Activation:
    """A call of an activation function whose result is to be cast.

    ``signs`` stands for what a ReLU saved; ``held`` is what is held for the argument and ``uncast`` the result of
    the tensor held; ``source`` gives the result from the cast of an argument that was left uncast.
    """

    result: Tensor
    signs: ReluSigns | None = None
    uncast: Tensor | None = None
    held: Held | None = None
    source: Callable[[], Tensor] | None = None


class CastingRuntime:
    """State of a casting between and during forward calls; shared by all hooks, and by deep copies of the module.

    Args:
        activations: Format of activations, or ``None``.
        errors: Format of errors, or ``None``.
        counter: Gives each forward call its draws.
        backend: For the ops.
        codes: Whether saved activations are kept as codes.
    """

    def __init__(
        self,
        activations: NumberFormat | None,
        errors: NumberFormat | None,
        counter: ForwardCounter,
        backend: BackendName,
        codes: bool,
    ) -> None:
        self.activations, self.errors, self.counter, self.backend = activations, errors, counter, backend
        self.store = CodeStore(activations, backend) if codes and activations is not None else None
        self.active = False
        self.shielded: dict[str, Callable[..., Any]] | None = None
        self.report = traced.Report()
        self.root: Callable[[], nn.Module | None] = lambda: None
        self.functional_sites: dict[str, None] = {}
        self.tracker = OutputTracker()
        self.reset()

    def reset(self) -> None:
        """Forget all that belongs to a running forward."""
        self.call: ForwardCall | None = None
        self.last: ForwardCall | None = None
        self.entries: dict[str, list[tuple[CallDraws, int]]] = {}
        self.muted = False
        self.packing = False
        self.in_context = False
        self.stack: list[Frame] = []
        self.ends = OpenEnds()
        self.tracker.drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> CastingRuntime:
        return self  # copies of a module go on drawing from one counter, so that no draw is made twice

    def __getstate__(self) -> dict[str, Any]:
        kept = ("activations", "errors", "counter", "backend", "active", "functional_sites")
        state = {name: self.__dict__[name] for name in kept}
        return {**state, "codes": self.store is not None, "outputs": self.tracker.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        codes, outputs = state.pop("codes"), state.pop("outputs")
        self.__dict__.update(state)
        self.store = CodeStore(self.activations, self.backend) if codes and self.activations is not None else None
        self.root = lambda: None
        self.shielded, self.report = None, traced.Report()
        self.tracker = OutputTracker()
        self.tracker.load_state_dict(outputs)
        self.reset()

    def shield(self) -> None:
        """Get ready for compiled forwards, if whatever compiles has been imported; importing it takes seconds.

        Where the network's outputs are not known yet, a compiled graph breaks at the hooks and runs them as they are.
        """
        if self.shielded is None and "torch._dynamo" in sys.modules:
            names = ("_enter", "_leave", "_on_activation", "_watch")
            self.shielded = {name: torch.compiler.disable(getattr(self, name)) for name in names}

    def _run_shielded(self, name: str, *args: Any) -> Any:
        return getattr(self, name)(*args) if self.shielded is None else self.shielded[name](*args)

    def _learns(self, name: str, module: nn.Module) -> bool:
        """Whether what runs now, or would begin with ``name``, finds the network's outputs."""
        if self.call is not None:
            return self.call.learning
        return (name, self._training(module)) not in self.tracker.learned

    def knows_outputs(self) -> bool:
        """Whether the outputs of some network have been found in the mode that the root is in now."""
        root = self.root()
        return root is None or any(training == self._training(root) for _, training in self.tracker.learned)

    def _training(self, module: nn.Module) -> bool:
        return (self.root() or module).training and torch.is_grad_enabled()

    # ---------------------------------------------------------------- hooks

    def enter(self, name: str, scope: Scope, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook of every hooked module."""
        if not self.active:
            return None
        if not torch.compiler.is_compiling():
            return self._enter(name, scope, module, args, kwargs)
        if scope != "excluded" and self._learns(name, module):
            return self._run_shielded("_enter", name, scope, module, args, kwargs)
        traced.enter(self, name, scope, module)
        return None

    def _enter(self, name: str, scope: Scope, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._unwind(name)
        frame = Frame(name, scope)
        changed = None
        if scope == "container" and is_redirected(module):
            frame.counted = False
        elif self.call is None and scope != "excluded":
            changed = self._open(frame, module, args, kwargs)
        elif self.call is not None and self.call.learning and scope == "layer":
            self.tracker.consume(args)
        if self.call is not None and self.call.training and not self.call.replay:
            self.entries.setdefault(name, []).append((self.call.draws, self.call.index))
        self.stack.append(frame)
        return changed

    def leave(self, name: str, scope: Scope, module: nn.Module, output: Any) -> Any:
        """Forward hook of every hooked module; returns its output, cast where it is a site."""
        if not self.active or not any(frame.name == name for frame in self.stack):
            return None
        if not torch.compiler.is_compiling():
            return self._leave(name, scope, module, output)
        if self.call is not None and self.call.learning:
            return self._run_shielded("_leave", name, scope, module, output)
        return traced.leave(self, name, scope, module, output)

    def _leave(self, name: str, scope: Scope, module: nn.Module, output: Any) -> Any:
        while self.stack[-1].name != name:
            self.stack.pop()
        frame = self.stack.pop()
        if scope == "activation" and torch.is_tensor(output):
            output = self._cast(name, frame.made(output) or _Activation(output))
        elif scope == "layer":
            output = self._cast_layer(name, module, output)
        return self._close(output) if frame.opened else output

    def _unwind(self, name: str) -> None:
        """Drop what a forward that raised has left: the module that is entered now cannot be running already."""
        for at, frame in enumerate(self.stack):
            if frame.name == name and frame.counted:
                if any(later.opened for later in self.stack[at:]):
                    self.call = None
                    self.tracker.drop()
                del self.stack[at:]
                return

    def _open(self, frame: Frame, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Begin a forward call; returns its arguments, cast where they are outputs of an earlier one."""
        frame.opened = True
        if torch._C._current_graph_task_id() != -1 and self._replay(frame.name):
            return None
        if not self.in_context:
            self.entries.clear()
        training = self._training(module)
        self.call = self.last = self._new_call(frame.name, training, self.counter.open(training))
        self.call.learning = (frame.name, training) not in self.tracker.learned
        if self.call.learning and self.in_context and not any(other.name == "" for other in self.stack):
            _warn_if_bypassed(self.root(), module)
        self.muted = True
        try:
            joined = replace_tensors((args, kwargs), self.ends.joined)
        finally:
            self.muted = False
        if not self.in_context:
            self.ends.clear()
        return joined

    def _new_call(self, owner: str, training: bool, draws: CallDraws) -> ForwardCall:
        return ForwardCall(owner, training, draws.rounding, draws, None if self.shielded is None else draws.tensor)

    def _replay(self, name: str) -> bool:
        """Begin the repetition of a forward during backward (activation checkpointing) with the draws it had.

        Raises:
            RuntimeError: If functions are cast too: no mode sees them in backward.
        """
        if not self.entries.get(name):
            return False
        if self.functional_sites and not self.in_context:
            raise RuntimeError(
                f"{name!r} is run again in backward (activation checkpointing), where activations that are called as "
                f"functions ({', '.join(self.functional_sites)}) cannot be cast as they were in forward. Use modules "
                "such as nn.ReLU in their place, or no checkpointing."
            )
        draws, index = self.entries[name].pop()  # backward goes through the calls from the last to the first
        self.call = self._new_call(name, True, draws)
        self.call.index, self.call.replay = index, True
        return True

    def _close(self, output: Any) -> Any:
        call = self.call
        assert call is not None
        if call.learning and output is not None:  # None: forward raised, so nothing was learned
            output = self.tracker.finish(call.owner, call.training, output, self._note_end)
            self.report.expected[call.owner, call.training] = call.reached
        self.call = None
        return output

    def _note_end(self, uncast: Tensor, out: Tensor) -> None:
        self.ends.add(uncast, lambda: out)

    # ---------------------------------------------------------------- casts

    def _cast_layer(self, name: str, module: nn.Module, output: Any) -> Any:
        if isinstance(module, nn.MultiheadAttention):
            return (self._cast(name, _Activation(output[0])), *output[1:])
        if isinstance(output, PackedSequence):
            return output._replace(data=self._cast(name, _Activation(output.data)))
        if isinstance(output, tuple):
            return tuple(self._cast_layer(name, module, part) for part in output)
        return self._cast(name, _Activation(output)) if torch.is_tensor(output) else output

    def _cast(self, site: str, activation: _Activation) -> Tensor:
        """Cast the result of a site; leave it where it is the network's output."""
        raw, call = activation.result, self.call
        if call is None or not raw.is_floating_point() or raw.is_nested or raw.is_sparse or raw.numel() == 0:
            return raw
        index, place = call.next_index(), call.place(site)
        if place in self.tracker.places or (call.replay and self.tracker.is_output(site)):
            source = activation.source or (lambda: raw)
            self.ends.add(raw, lambda: self._round(source(), call.draws, index))
            return raw
        out = self._round(raw, call.draws, index, activation.signs)
        if call.learning:
            self.tracker.advance()
            self._hold(out, activation, place)
        return out

    def _hold(self, out: Tensor, activation: _Activation, place: Place) -> None:
        held = activation.held
        if held is None or activation.uncast is None:
            self.tracker.hold(out, activation.result, (place,))
        else:
            self.tracker.hold(out, activation.uncast, (*held.places, place))
            held.used = True

    def _round(self, raw: Tensor, draws: CallDraws, index: int, signs: ReluSigns | None = None) -> Tensor:
        error = None
        if self.errors is not None and raw.requires_grad and torch.is_grad_enabled():
            error = partial(quantize, fmt=self.errors, key=draws.error_key(index), backend=self.backend)
        if self.activations is None:
            return cast_with(raw, None, error)
        key = draws.activation_key(index) if draws.rounding == "stochastic" else None
        if self.store is not None and self.packing:
            return self.store.cast(raw, draws.rounding, key, error, signs)
        activation: Rounder = partial(
            quantize, fmt=self.activations, rounding=draws.rounding, key=key, backend=self.backend
        )
        return cast_with(raw, activation, error)

    # ------------------------------------------------- functional activations

    def on_activation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by the torch-function mode instead of an activation function."""
        if not torch.compiler.is_compiling():
            return self._on_activation(func, args, kwargs)
        if self.call is not None and self.call.learning:
            return self._run_shielded("_on_activation", func, args, kwargs)
        return traced.on_activation(self, func, args, kwargs)

    def _on_activation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs.get("input")
        scope = self.stack[-1].scope if self.stack else None
        if self.muted or not self.active or not torch.is_tensor(x) or scope in ("layer", "excluded"):
            return func(*args, **kwargs)
        if self.shielded is not None and traced.is_running():  # what is to be cast in a graph is cast there
            return func(*args, **kwargs)
        function = ActivationFunction(
            func, args[1:], {name: value for name, value in kwargs.items() if name != "input"}
        )
        if self.call is None:
            return self._loose_activation(function, x)
        frame = self.stack[-1]
        if frame.scope == "activation":
            frame.activation = self._run(function, x)
            return frame.activation.result
        site = f"{frame.name}:{function.name}".lstrip(":")
        self.functional_sites[site] = None
        if not function.inplace:
            return self._cast(site, self._run(function, x))
        # The user may go on with the argument instead of the result: bring the cast into it. The function itself runs
        # on a copy, because a ReLU keeps its result for backward and must not find it overwritten.
        out = self._cast(site, self._run(function, x.clone()))
        x.copy_(out)
        if self.store is not None and self.packing:
            self.store.alias(out, x)
        return x

    def _run(self, function: ActivationFunction, x: Tensor) -> _Activation:
        """Run an activation function whose result will be cast."""
        hooks = _saved_tensor_hooks()
        ours = hooks is not None and self.packing and self.store is not None and hooks[0] == self.store.pack
        # Activation checkpointing counts what is saved: nothing may be run beside the function itself.
        held = self.tracker.find(x) if hooks is None or ours else None
        end = self.ends.find(x)
        made = _Activation(x)
        if held is not None and function.repeatable:
            without = held.uncast_view(x)
            if without is not None:
                made.uncast, made.held = function(without.clone() if function.inplace else without), held
        if end is not None and function.repeatable and not function.inplace:
            made.source = lambda: function(end.cast())
        if function.is_relu and ours:
            made.signs = ReluSigns(self.backend)
            with torch.autograd.graph.saved_tensors_hooks(made.signs.pack, ReluSigns.unpack):
                made.result = function(x)
        else:
            made.result = function(x)
        return made

    def _loose_activation(self, function: ActivationFunction, x: Tensor) -> Tensor:
        """An activation function outside of any module: a hidden layer only if its result goes into a module."""
        end, last = self.ends.find(x), self.last
        result = function(x)
        if end is not None and last is not None and function.repeatable and not function.inplace:
            index = last.next_index()
            self.ends.add(result, lambda: self._round(function(end.cast()), last.draws, index))
        return result

    def watcher(self) -> Callable[..., None] | None:
        """What the mode calls after every other function: only while the network's outputs are being found."""
        if self.call is None or not self.call.learning or self.muted:
            return None
        return self._watch if self.shielded is None else self.shielded["_watch"]

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func in SOFTMAX_FUNCTIONS and (self.packing or _saved_tensor_hooks() is None):
            held = self.tracker.find(args[0] if args else None)
            without = None if held is None else held.uncast_view(args[0])
            if held is not None and without is not None:
                self.tracker.hold(out, func(without, *args[1:], **kwargs), held.places)
        elif tensors_in(out):
            self.tracker.consume((args, kwargs), out)


def _saved_tensor_hooks() -> tuple[Any, Any] | None:
    """The pack and unpack hooks that are in force now; ``None`` without any, or without gradients."""
    if not torch.is_grad_enabled():
        return None
    query = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not public
    top: tuple[Any, Any] | None = None if query is None else query(True)
    return top


def _warn_if_bypassed(root: nn.Module | None, module: nn.Module) -> None:
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
