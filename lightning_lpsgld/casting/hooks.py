"""The hooks that a casting puts on modules: small objects that only pass the call on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

if TYPE_CHECKING:
    from lightning_lpsgld.casting.runtime import CastingRuntime

__all__ = ["EnterHook", "Frame", "LeaveHook", "Scope", "is_redirected", "remove_hooks"]

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


class _Hook:
    __slots__ = ("name", "runtime", "scope")

    def __init__(self, runtime: CastingRuntime, name: str, scope: Scope) -> None:
        self.runtime, self.name, self.scope = runtime, name, scope


class EnterHook(_Hook):
    """Forward pre-hook."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called by torch before ``forward``."""
        return self.runtime.enter(self.name, self.scope, module, args, kwargs)


class LeaveHook(_Hook):
    """Forward hook."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Called by torch with the result of ``forward``, ``None`` if it raised."""
        return self.runtime.leave(self.name, self.scope, module, output)


def remove_hooks(root: nn.Module, runtime: CastingRuntime) -> None:
    """Take the hooks of ``runtime`` off all submodules."""
    for module in root.modules():
        tables = (
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks,
            module._forward_hooks_always_called,
        )
        hooks = [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]
        mine = [key for key, hook in hooks if getattr(hook, "runtime", None) is runtime]
        for table in tables:
            for key in mine:
                table.pop(key, None)


def is_redirected(module: nn.Module) -> bool:
    """Whether ``forward`` is not the class's own: Lightning's strategies route a whole training step through it."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    compiled = getattr(forward, "_torchdynamo_orig_callable", forward)  # Lightning compiles steps and forward, each
    return getattr(compiled, "__func__", None) is not type(module).forward
