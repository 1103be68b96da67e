"""The cast itself: a tensor is rounded now, its gradient when it comes back, and the result carries its codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.casting.codes import CodeBook
from lightning_lpsgld.casting.draws import CallDraws, Rounding
from lightning_lpsgld.casting.functions import ActivationFunction
from lightning_lpsgld.casting.pending import Cast, Pending, settled
from lightning_lpsgld.casting.saved import ReluSigns
from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import Encoded, decode, encode, quantize
from lightning_lpsgld.ops.autograd import Rounder, cast_with
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.ops.evaluation import Chain, refusal
from lightning_lpsgld.random import DrawKey, Role, stream_id

__all__ = ["Caster", "is_castable"]


#: How often the codes of a site are made before anyone has taken them.
_OFFERS = 2


def is_castable(x: Tensor) -> bool:
    """Whether there is anything to round in ``x``."""
    return x.is_floating_point() and not x.is_nested and not x.is_sparse and x.numel() > 0


class Caster:
    """Formats of both directions, and the codes of what was cast.

    Args:
        activations: Format of activations, or ``None``.
        errors: Format of errors, or ``None``.
        backend: For the ops.

    Attributes:
        book: Codes of the cast tensors that are alive.
        watched: Whether all calls of functions are seen, so that it is known when a tensor is overwritten.
        lazy: Whether casts may wait for what follows: in an evaluation whose codes someone asks for.
        carrying: Whether all casts go by way of codes, which ``book`` then has.
        asked: How many have asked for codes; then the casts whose codes are taken carry them, and each at first.
        taken: Sites whose codes were taken.
    """

    def __init__(self, activations: NumberFormat | None, errors: NumberFormat | None, backend: BackendName) -> None:
        self.activations, self.errors, self.backend = activations, errors, backend
        self.book = CodeBook()
        self.carrying = False
        self.lazy = self.watched = False
        self.asked = 0
        self.taken: set[str] = set()
        self._offered: Counter[str] = Counter()

    def ask(self) -> None:
        """Let casts carry codes, until :meth:`unask`."""
        self.asked += 1

    def unask(self) -> None:
        """Take back one :meth:`ask`."""
        self.asked -= 1
        if self.asked == 0:
            self.taken.clear()
            self._offered.clear()
            self.book.clear()

    def offer_again(self) -> None:
        """Let every cast carry codes at first again: what ran so far may have run for nobody who takes them."""
        self._offered.clear()

    def _carries(self, site: str) -> bool:
        if self.carrying or not self.asked:
            return self.carrying
        self._offered[site] += 1
        return site in self.taken or self._offered[site] <= _OFFERS

    def run(self, function: ActivationFunction, x: Tensor) -> Tensor:
        """Result of an activation function that will be cast at once; a ReLU may wait for the cast."""
        fmt = self.activations if self._waits() else None
        if fmt is not None and function.is_relu and not function.inplace and refusal(x, fmt) is None:
            return Pending(Chain(x, relu=True), owned=False)
        return function(x)

    def end_call(self) -> Callable[[Any], Any]:
        """Casts wait no longer; returns what gives the values of one that does."""
        self.lazy = False
        return settled

    def _waits(self) -> bool:
        return self.lazy and self.watched and not torch.is_grad_enabled()

    def _later(self, x: Tensor, site: str, fresh: bool) -> Tensor | None:
        """The cast, waiting for what follows, if it can."""
        fmt = self.activations
        if fmt is None or not (isinstance(x, Pending) or (fresh and refusal(x, fmt) is None)):
            return None

        def register(value: Tensor, encoded: Encoded) -> None:
            self.book.register(value, encoded).site = site

        cast = Cast(fmt, self.backend, site, lambda: self._carries(site), register)
        if not isinstance(x, Pending):
            return Pending(Chain(x), cast)
        out = x.then(cast)
        if not out.owned and not (self._carries(site) and out.codes() is not None):
            return out.values()
        return out

    def round(
        self, x: Tensor, draws: CallDraws, index: int, site: str = "", signs: ReluSigns | None = None, *,
        fresh: bool = False,
    ) -> Tensor:  # fmt: skip
        """Cast number ``index`` of a call; ``signs`` belongs to the ReLU that gave ``x``, a ``fresh`` x to nobody."""
        later = self._later(x, site, fresh) if self._waits() else None
        if later is not None:
            return later
        x = settled(x)
        error: Rounder | None = None
        if self.errors is not None and x.requires_grad and torch.is_grad_enabled():
            error = partial(quantize, fmt=self.errors, key=draws.error_key(index), backend=self.backend)
        if self.activations is None:
            return cast_with(x, None, error)
        key = draws.activation_key(index) if draws.rounding == "stochastic" else None
        if self._carries(site):
            return self._through_codes(x, draws.rounding, key, error, site, signs)
        activation = partial(quantize, fmt=self.activations, rounding=draws.rounding, key=key, backend=self.backend)
        return cast_with(x, activation, error)

    def _through_codes(
        self, x: Tensor, rounding: Rounding, key: DrawKey | None, error: Rounder | None, site: str,
        signs: ReluSigns | None,
    ) -> Tensor:  # fmt: skip
        """The same values by way of codes, which are registered."""
        made: list[Encoded | None] = []

        def activation(value: Tensor) -> Tensor:
            rounded, encoded = self._encode(value, rounding, key)
            made.append(encoded)
            return rounded

        out = cast_with(x, activation, error)
        if made[0] is not None:
            codes = self.book.register(out, made[0])
            codes.site = site
            if signs is not None:
                signs.attach(codes, x.detach())
            if self.carrying:
                codes.pack()
        return out

    def _encode(self, x: Tensor, rounding: Rounding, key: DrawKey | None) -> tuple[Tensor, Encoded | None]:
        """``quantize(x)``, and its codes; ``None`` where the format has no code (a NaN)."""
        fmt = self.activations
        assert fmt is not None
        try:
            encoded = encode(x, fmt, rounding=rounding, key=key, backend=self.backend)
        except ValueError:  # the plain quantizer keeps NaN; whatever else is wrong with the call it will say
            return quantize(x, fmt, rounding=rounding, key=key, backend=self.backend), None
        return decode(encoded, x.dtype, backend=self.backend), encoded

    def node(self, x: Tensor, key: Tensor | None, rounding: Rounding, index: int) -> Tensor:
        """The same cast as one node of a compiled graph; ``key`` is a tensor, so that a new step compiles nothing."""
        from lightning_lpsgld.ops.library import cast_node

        activations, errors = self.activations, self.errors
        return cast_node(
            x,
            key,
            None if activations is None else str(activations),
            stream_id(Role.ACTIVATION, index),
            None if errors is None else str(errors),
            stream_id(Role.ERROR, index),
            rounding,
            self.backend,
        )
