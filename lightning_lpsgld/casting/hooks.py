"""How casts get into a module: forward hooks and a torch-function mode, which only pass the call on.

What is done with a call is decided in ``session``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_lpsgld.casting.calls import Scope
from lightning_lpsgld.casting.functions import ACTIVATION_FUNCTIONS, written_by
from lightning_lpsgld.casting.heads import HeadCasts
from lightning_lpsgld.casting.session import Session

__all__ = ["EnterHook", "FunctionalMode", "LeaveHook", "add_hooks", "remove_hooks", "sessions_on"]


class _Hook:
    __slots__ = ("name", "scope", "session")

    def __init__(self, session: Session, name: str, scope: Scope) -> None:
        self.session, self.name, self.scope = session, name, scope


class EnterHook(_Hook):
    """Forward pre-hook."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called by torch before ``forward``."""
        return self.session.enter(self.name, self.scope, module, args, kwargs)


class LeaveHook(_Hook):
    """Forward hook."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Called by torch with the result of ``forward``, ``None`` if it raised."""
        return self.session.leave(self.name, self.scope, module, output)


def sessions_on(root: nn.Module) -> list[Session]:
    """The sessions whose hooks are on any submodule, in order."""
    hooks: list[Any] = [hook for module in root.modules() for hook in module._forward_hooks.values()]
    return list(dict.fromkeys(hook.session for hook in hooks if isinstance(hook, _Hook)))


def add_hooks(module: nn.Module, session: Session, name: str, scope: Scope) -> None:
    """Let a module tell the session when it is entered and left."""
    module.register_forward_pre_hook(EnterHook(session, name, scope), prepend=True, with_kwargs=True)
    # Called when forward raises as well: activation checkpointing ends a repeated forward by an exception.
    module.register_forward_hook(LeaveHook(session, name, scope), always_call=True)


def remove_hooks(root: nn.Module, session: Session) -> None:
    """Take the hooks of a session off all submodules."""
    for module in root.modules():
        tables = (
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks,
            module._forward_hooks_always_called,
        )
        hooks = [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]
        mine = [key for key, hook in hooks if isinstance(hook, _Hook) and hook.session is session]
        for table in tables:
            for key in mine:
                table.pop(key, None)


class FunctionalMode(TorchFunctionMode):
    """Hands calls of activation functions to a session, and every other call to its watcher while there is one.

    What a library function calls inside (``F.cross_entropy``) is not seen, only the function itself; attention is
    opened where its heads are to be cast.
    """

    def __init__(self, session: Session, heads: HeadCasts) -> None:
        super().__init__()
        self.session, self.heads = session, heads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in ACTIVATION_FUNCTIONS:
            return self.session.on_activation(func, args, kwargs or {})
        if self.heads.concerns(func):
            return self.heads.run(func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        book = self.session.caster.book
        if len(book):
            for x in written_by(func, args, kwargs or {}):
                book.forget(x)
        watch = self.session.watcher()
        if watch is not None:
            watch(func, args, kwargs or {}, out)
        return out
