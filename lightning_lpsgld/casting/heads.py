"""Inside attention: what the heads give is cast on its way into the output projection, where ``sites`` asks for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_lpsgld.casting.cast import is_castable
from lightning_lpsgld.casting.session import Session
from lightning_lpsgld.ops.attention import opened_attention

__all__ = ["HeadCasts"]


class HeadCasts:
    """Runs the attention of chosen modules with a cast before its output projection.

    Args:
        session: Whose draws and formats the casts have.
        names: Names of the attention layers.
    """

    def __init__(self, session: Session, names: Iterable[str]) -> None:
        self.session, self.names = session, frozenset(names)

    def concerns(self, func: Any) -> bool:
        """Whether a call of a function is the attention of a chosen module."""
        if not self.names or func is not F.multi_head_attention_forward:
            return False
        session = self.session
        frames = session.calls.frames
        return session.active and not session.muted and bool(frames) and frames[-1].name in self.names

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attention, with the cast.

        Raises:
            RuntimeError: In a compiled graph, or where torch's function cannot be opened.
        """
        site = f"{self.session.calls.frames[-1].name}.out_proj"
        opened = opened_attention()
        if torch.compiler.is_compiling() or opened is None:
            raise RuntimeError(
                f"`sites` asks for a cast before {site!r}, inside of attention, where none can be put "
                + ("in a compiled graph. Leave torch.compile out" if opened is not None else "in this version of torch")
                + f", or take {site!r} out of `sites`."
            )
        weight = inspect.signature(func).bind(*args, **kwargs).arguments["out_proj_weight"]
        self.session.functional_sites[site] = None
        with _BeforeProjection(self.session, site, weight):
            return opened(*args, **kwargs)


class _BeforeProjection(TorchFunctionMode):
    """Casts the input of the linear product with one weight."""

    def __init__(self, session: Session, site: str, weight: Tensor) -> None:
        super().__init__()
        self.session, self.site, self.weight = session, site, weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        call = self.session.calls.call
        if func is F.linear and len(args) > 1 and args[1] is self.weight and call is not None and is_castable(args[0]):
            cast = self.session.caster.round(args[0], call.draws, call.next_index(), self.site)
            args = (cast, *args[1:])
        return func(*args, **(kwargs or {}))
