"""What happens when a hooked module is entered or left, or calls an activation function: one state machine.

The state is the forward call that runs (``CallStack.call``):

=============== ============================ ================================== =====================================
state           it begins when               a site's result is                 it ends when
=============== ============================ ================================== =====================================
idle            (at first)                   left                               a layer, activation or container is
                                                                                entered
finding outputs the first forward of a       cast, and held beside what would   its outermost module is left: what
                module in a mode             stand there without the cast       was returned is given back uncast, and
                                                                                its places are known from now on
casting         any later forward            cast, or left at a known place of  its outermost module is left
                                             an output (an *open end*)
repeating       a forward in backward        as in the forward that it repeats, its outermost module is left
                (activation checkpointing)   with the same draws
muted           within any of these, while   left                               the arguments are joined
                open ends that go into
                another network are cast
=============== ============================ ================================== =====================================

A forward that raises leaves its frames; the next entry of one of its modules takes them off (``CallStack.unwind``).

The machine is the same under ``torch.compile``. Only three things differ while a graph is traced
(``torch.compiler.is_compiling()``): a call's key is a tensor, a cast is a node, and what depends on objects of one step
(open ends, repetitions, what is held) is left out, so that "finding outputs" runs outside of graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_lpsgld.casting.calls import (
    CallStack,
    ForwardCall,
    Frame,
    Scope,
    in_backward,
    is_redirected,
    warn_if_bypassed,
)
from lightning_lpsgld.casting.cast import Caster, is_castable
from lightning_lpsgld.casting.draws import CallDraws, ForwardCounter
from lightning_lpsgld.casting.functions import SOFTMAX_FUNCTIONS, ActivationFunction
from lightning_lpsgld.casting.graphs import GraphSide, is_running
from lightning_lpsgld.casting.outputs import Held, OpenEnds, OutputTracker, Place, replace_tensors, tensors_in
from lightning_lpsgld.casting.pending import settled
from lightning_lpsgld.casting.saved import ReluSigns, SavedCodes, saved_tensor_hooks
from lightning_lpsgld.casting.sites import FRESH_TYPES
from lightning_lpsgld.casting.storage import storage_pointer

__all__ = ["Session"]


@dataclass
class _Result:
    """The result of a site, to be cast.

    ``signs`` stands for what a ReLU saved; ``held`` is what is held for the argument and ``uncast`` the result of that;
    ``source`` gives the result from the cast of an argument that was left uncast; a ``fresh`` one is nobody else's.
    """

    result: Tensor
    signs: ReluSigns | None = None
    uncast: Tensor | None = None
    held: Held | None = None
    source: Callable[[], Tensor] | None = None
    fresh: bool = False


class Session:
    """State of a casting between and during forward calls; shared by all hooks, and by deep copies of the module.

    Args:
        caster: Makes the casts.
        counter: Gives each forward call its draws.
        codes: Whether autograd keeps codes.

    Attributes:
        active: Whether the hooks are on.
        calls: What is running.
        tracker: Where the network's outputs are.
        ends: Outputs that were left uncast in this context.
        functional_sites: Activation functions that were cast, in order.
        in_context: Whether a context is open that sees functions.
        packing: Whether autograd keeps codes in it.
        muted: See the table.
    """

    def __init__(self, caster: Caster, counter: ForwardCounter, codes: bool) -> None:
        self.caster, self.counter = caster, counter
        self.saved = SavedCodes(caster.book, caster.backend) if codes else None
        self.root: Callable[[], nn.Module | None] = lambda: None
        self.graphs, self.tracker = GraphSide(), OutputTracker()
        self.functional_sites: dict[str, None] = {}
        self.active = False
        self.reset()

    def reset(self) -> None:
        """Forget all that belongs to a running forward."""
        self.calls, self.ends = CallStack(), OpenEnds()
        self.in_context = self.packing = self.muted = False
        self.caster.carrying = self.caster.lazy = False
        self.tracker.drop()

    def end_context(self) -> None:
        """Forget what belongs to the context that is left; say what graphs have left out."""
        self.in_context = self.packing = self.caster.carrying = self.caster.lazy = False
        self.calls.end()
        self.ends.clear()
        self.tracker.drop()
        self.caster.book.clear()
        self.graphs.say()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self  # copies of a module go on drawing from one counter, so that no draw is made twice

    def __getstate__(self) -> dict[str, Any]:
        caster = self.caster
        return {
            "caster": (caster.activations, caster.errors, caster.backend),
            "counter": self.counter,
            "codes": self.saved is not None,
            "active": self.active,
            "functional_sites": self.functional_sites,
            "outputs": self.tracker.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Session.__init__(self, Caster(*state["caster"]), state["counter"], state["codes"])
        self.active, self.functional_sites = state["active"], state["functional_sites"]
        self.tracker.load_state_dict(state["outputs"])

    def shield(self) -> None:
        """Get ready for compiled forwards, if whatever compiles has been imported."""
        inner: dict[str, Callable[..., Any]] = {"enter": self._enter, "leave": self._leave}
        inner |= {"activation": self._on_activation, "watch": self._watch}
        self.graphs.shield(inner)

    def knows_outputs(self) -> bool:
        """Whether the outputs of some network have been found in the mode that the root is in now."""
        root = self.root()
        return root is None or any(training == self._training(root) for _, training in self.tracker.learned)

    def _training(self, module: nn.Module) -> bool:
        return (self.root() or module).training and torch.is_grad_enabled()

    # ------------------------------------------------------------------------------------------- entering and leaving

    def enter(self, name: str, scope: Scope, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook of every hooked module; returns its arguments where they change."""
        if not self.active:
            return None
        if torch.compiler.is_compiling() and scope != "excluded" and self._finds_outputs(name, module):
            return self.graphs.outside("enter", self._enter)(name, scope, module, args, kwargs)
        return self._enter(name, scope, module, args, kwargs)

    def _finds_outputs(self, name: str, module: nn.Module) -> bool:
        """Whether the call that runs, or the one that would begin with ``name``, finds the network's outputs."""
        if self.calls.call is not None:
            return self.calls.call.learning
        return (name, self._training(module)) not in self.tracker.learned

    def _enter(self, name: str, scope: Scope, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tracing, calls = torch.compiler.is_compiling(), self.calls
        if calls.unwind(name):
            self.tracker.drop()
        frame = Frame(name, scope)
        changed = None
        if not tracing and scope == "container" and is_redirected(module):
            frame.counted = False  # a redirected forward is outside of what it leads to
        elif calls.call is None and scope != "excluded":
            frame.opened = True
            if tracing:
                self._open_traced(name, module)
            else:
                changed = self._open(name, module, args, kwargs)
        elif calls.call is not None and calls.call.learning and scope == "layer":
            self.tracker.consume(args)
        if not tracing:
            calls.note_entry(name)
        calls.frames.append(frame)
        return changed

    def _open_traced(self, name: str, module: nn.Module) -> None:
        """Begin a forward call in a graph."""
        training = self._training(module)
        key = self.graphs.open(self.counter.state, training)
        self.calls.call = ForwardCall(name, training, self.counter.rounding(training), None, key)

    def _open(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Begin a forward call; returns its arguments, cast where they are outputs of an earlier one."""
        calls = self.calls
        if in_backward() and self._repeat(name):
            return None
        if not self.in_context:
            calls.entries.clear()
            self.caster.book.clear()
        training = self._training(module)
        calls.call = calls.last = self._new_call(name, training, self.counter.open(training))
        calls.call.learning = (name, training) not in self.tracker.learned
        if self.caster.asked:
            calls.call.inputs = frozenset(storage_pointer(x) for x in tensors_in((args, kwargs)))
            self.caster.lazy = not (training or calls.call.learning) and calls.call.rounding == "nearest"
        if calls.call.learning and self.in_context and not calls.runs(""):
            warn_if_bypassed(self.root(), module)
        self.muted = True
        try:
            joined = replace_tensors((args, kwargs), self.ends.joined)
        finally:
            self.muted = False
        if not self.in_context:
            self.ends.clear()
        return joined

    def _new_call(self, owner: str, training: bool, draws: CallDraws) -> ForwardCall:
        key = None if self.graphs.shielded is None else draws.tensor
        return ForwardCall(owner, training, draws.rounding, draws, key)

    def _repeat(self, name: str) -> bool:
        """Begin the repetition of a forward during backward (activation checkpointing) with the draws it had.

        Raises:
            RuntimeError: If functions are cast too: no mode sees them in backward.
        """
        entries = self.calls.entries.get(name)
        if not entries:
            return False
        if self.functional_sites and not self.in_context:
            raise RuntimeError(
                f"{name!r} is run again in backward (activation checkpointing), where activations that are called as "
                f"functions ({', '.join(self.functional_sites)}) cannot be cast as they were in forward. Use modules "
                "such as nn.ReLU in their place, or no checkpointing."
            )
        draws, index = entries.pop()  # backward goes through the calls from the last to the first
        self.calls.call = call = self._new_call(name, True, draws)
        call.index, call.replay = index, True
        return True

    def leave(self, name: str, scope: Scope, module: nn.Module, output: Any) -> Any:
        """Forward hook of every hooked module; returns its output, cast where it is a site."""
        if not self.active or not self.calls.runs(name):
            return None
        if torch.compiler.is_compiling() and self.calls.learning:
            return self.graphs.outside("leave", self._leave)(name, scope, module, output)
        return self._leave(name, scope, module, output)

    def _leave(self, name: str, scope: Scope, module: nn.Module, output: Any) -> Any:
        frame = self.calls.pop(name)
        if scope == "activation" and torch.is_tensor(output):
            output = self._cast(name, frame.made(output) or _Result(output))
        elif scope == "layer":
            output = self._cast_layer(name, module, output)
        return self._close(output) if frame.opened else output

    def _close(self, output: Any) -> Any:
        call = self.calls.call
        assert call is not None
        if torch.compiler.is_compiling():
            self.graphs.note(call, self.functional_sites, self.packing)
        elif call.learning and output is not None:  # None: forward raised, so nothing was learned
            output = self.tracker.finish(call.owner, call.training, output, self.ends.note)
            self.graphs.expected[call.owner, call.training] = call.reached
        self.calls.call = None
        return replace_tensors(output, self.caster.end_call()) if self.caster.lazy else output

    # ---------------------------------------------------------------------------------------------------------- casts

    def _cast_layer(self, name: str, module: nn.Module, output: Any) -> Any:
        if isinstance(module, nn.MultiheadAttention) and output is not None:
            return (self._cast(name, _Result(output[0])), *output[1:])
        if isinstance(output, PackedSequence):
            return output._replace(data=self._cast(name, _Result(output.data)))
        if isinstance(output, tuple):
            return tuple(self._cast_layer(name, module, part) for part in output)
        fresh = isinstance(module, FRESH_TYPES)
        return self._cast(name, _Result(output, fresh=fresh)) if torch.is_tensor(output) else output

    def _cast(self, site: str, made: _Result) -> Tensor:
        """Cast the result of a site; leave it where it is the network's output."""
        raw, call = made.result, self.calls.call
        if call is None or not is_castable(raw):
            return settled(raw)
        index, place = call.next_index(), call.place(site)
        tracing = torch.compiler.is_compiling()
        if place in self.tracker.places or (call.replay and self.tracker.is_output(site)):
            if not tracing:
                source = made.source or (lambda: raw)
                raw = settled(raw)
                self.ends.add(raw, lambda: self.caster.round(source(), call.draws, index))
            return raw
        if tracing:
            return self.caster.node(raw, call.key, call.rounding, index)
        out = self.caster.round(raw, call.draws, index, site, made.signs, fresh=made.fresh)
        if call.learning:
            self.tracker.advance()
            self._hold(out, made, place)
        return out

    def _hold(self, out: Tensor, made: _Result, place: Place) -> None:
        held = made.held
        if held is None or made.uncast is None:
            self.tracker.hold(out, made.result, (place,))
        else:
            self.tracker.hold(out, made.uncast, (*held.places, place))
            held.used = True

    # ------------------------------------------------------------------------------------------ functional activations

    def on_activation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by the torch-function mode instead of an activation function."""
        if torch.compiler.is_compiling() and self.calls.learning:
            return self.graphs.outside("activation", self._on_activation)(func, args, kwargs)
        return self._on_activation(func, args, kwargs)

    def _on_activation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tracing, calls = torch.compiler.is_compiling(), self.calls
        x = args[0] if args else kwargs.get("input")
        scope = calls.scope
        if self.muted or not self.active or not torch.is_tensor(x) or scope in ("layer", "excluded"):
            return func(*args, **kwargs)
        if tracing and (calls.call is None or scope != "container"):
            return func(*args, **kwargs)  # an activation module's result is cast when the module is left
        if not tracing and self.graphs.shielded is not None and is_running():
            return func(*args, **kwargs)  # what is to be cast in a graph is cast there
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        function = ActivationFunction(func, args[1:], rest)
        if calls.call is None:
            return self._loose_activation(function, x)
        frame = calls.frames[-1]
        if frame.scope == "activation":
            frame.activation = self._run(function, x)
            return frame.activation.result
        return self._cast_function(f"{frame.name}:{function.name}".lstrip(":"), function, x)

    def _cast_function(self, site: str, function: ActivationFunction, x: Tensor) -> Tensor:
        """Result of an activation function that is a site of its own."""
        if not torch.compiler.is_compiling():
            self.functional_sites[site] = None
        if not function.inplace:
            return self._cast(site, self._run(function, x))
        # The user may go on with the argument: the cast goes into it. A copy is run, as a ReLU keeps its own result.
        out = self._cast(site, self._run(function, x.clone()))
        x.copy_(out)
        if self.caster.carrying or self.caster.asked:
            self.caster.book.alias(out, x)
        return x

    def _run(self, function: ActivationFunction, x: Tensor) -> _Result:
        """Run an activation function whose result will be cast."""
        if torch.compiler.is_compiling():
            return _Result(function(x))
        ours = self.saved is not None and self.packing and self.saved.in_force()
        # Activation checkpointing counts what is saved: nothing may be run beside the function itself.
        held = self.tracker.find(x) if ours or saved_tensor_hooks() is None else None
        end = self.ends.find(x)
        made = _Result(x)
        if held is not None and function.repeatable:
            without = held.uncast_view(x)
            if without is not None:
                made.uncast, made.held = function(without.clone() if function.inplace else without), held
        if end is not None and function.repeatable and not function.inplace:
            made.source = lambda: function(end.cast())
        if function.is_relu and ours:
            made.signs = ReluSigns(self.caster.backend)
            with torch.autograd.graph.saved_tensors_hooks(made.signs.pack, ReluSigns.unpack):
                made.result = function(x)
        else:
            made.result = self.caster.run(function, x)
        return made

    def _loose_activation(self, function: ActivationFunction, x: Tensor) -> Tensor:
        """An activation function outside of any module: a hidden layer only if its result goes into a module."""
        end, last = self.ends.find(x), self.calls.last
        result = function(x)
        if end is not None and last is not None and function.repeatable and not function.inplace:
            index = last.next_index()
            self.ends.add(result, lambda: self.caster.round(function(end.cast()), last.draws, index))
        return result

    def watcher(self) -> Callable[..., None] | None:
        """What the mode calls after every other function: only while the network's outputs are being found."""
        if self.calls.call is None or not self.calls.call.learning or self.muted:
            return None
        return self.graphs.outside("watch", self._watch)

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func in SOFTMAX_FUNCTIONS and (self.packing or saved_tensor_hooks() is None):
            held = self.tracker.find(args[0] if args else None)
            without = None if held is None else held.uncast_view(args[0])
            if held is not None and without is not None:
                self.tracker.hold(out, func(without, *args[1:], **kwargs), held.places)
        elif tensors_in(out):
            self.tracker.consume((args, kwargs), out)
