"""A tensor whose operations wait: cast, batch norm, ReLU and cast are made in one pass, to codes if a layer takes them.

In evaluation nothing is drawn and nothing is kept for backward, so a cast need not be made when it is asked for. What
waits is a :class:`~lightning_lpsgld.ops.evaluation.Chain`; a batch norm and a ReLU join it, every other operation gets
the values, which are those that would have been there at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import Encoded, decode
from lightning_lpsgld.ops.coded import plain
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.ops.evaluation import Chain, Norm, evaluate, rounded

__all__ = ["Cast", "Pending", "settled"]

aten = torch.ops.aten


class Cast:
    """The rounding at a site.

    Args:
        fmt: The grid.
        backend: Decodes.
        site: Where it is.
        wants_codes: Whether values are to be made by way of codes, which are then handed to ``register``.
        register: Called with values and their codes.
    """

    __slots__ = ("backend", "fmt", "register", "site", "wants_codes")

    def __init__(
        self, fmt: NumberFormat, backend: BackendName, site: str, wants_codes: Callable[[], bool],
        register: Callable[[Tensor, Encoded], None],
    ) -> None:  # fmt: skip
        self.fmt, self.backend, self.site = fmt, backend, site
        self.wants_codes, self.register = wants_codes, register

    def values(self, chain: Chain) -> Tensor:
        """The result of a chain, rounded."""
        encoded = self.codes(chain) if self.wants_codes() else None
        return rounded(chain, self.fmt) if encoded is None else self.decoded(encoded)

    def codes(self, chain: Chain) -> Encoded | None:
        """Codes of the result; ``None`` if it has a NaN."""
        try:
            found = evaluate(chain, self.fmt)
        except ValueError:  # the plain quantizer keeps NaN
            return None
        assert isinstance(found, Encoded)
        return found

    def decoded(self, encoded: Encoded) -> Tensor:
        """Values of codes, from which the codes are found again."""
        value = decode(encoded, torch.float32, backend=self.backend)
        self.register(value, encoded)
        return value


class Pending(Tensor):
    """What a chain of operations, and a last cast, will give; a plain tensor to all but a layer that wants codes.

    Args:
        chain: The operations.
        cast: The rounding after them, if any.
        owned: Whether nobody else writes to what they begin with, so that they can wait.
    """

    owned: bool
    _chain: Chain | None
    _cast: Cast | None
    _encoded: Encoded | None
    _value: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Pending], chain: Chain, cast: Cast | None = None, owned: bool = True) -> Pending:
        """Make one; the docstring of the class says of what."""
        raw = chain.raw
        made: Pending = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, strides=raw.stride(), dtype=raw.dtype, device=raw.device
        )
        made._chain, made._cast, made._encoded, made._value = chain, cast, None, None
        made.owned = owned
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # all was done in __new__

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.values())

    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array."""
        return self.values().numpy(force=force)

    def tolist(self) -> Any:
        """The values as numbers."""
        return self.values().tolist()

    def data_ptr(self) -> int:
        """Address of the values."""
        return self.values().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Storage of the values."""
        return self.values().untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.values(), memo)

    @property
    def waits(self) -> bool:
        """Whether nothing was made yet."""
        return self._chain is not None

    def values(self) -> Tensor:
        """The values; made once."""
        if self._value is None:
            if self._encoded is not None and self._cast is not None:
                self._value = self._cast.decoded(self._encoded)
            else:
                assert self._chain is not None
                made = evaluate(self._chain, None) if self._cast is None else self._cast.values(self._chain)
                assert isinstance(made, Tensor)
                self._value = made
            self._chain = self._encoded = None
        return self._value

    def codes(self) -> tuple[Encoded, str] | None:
        """Codes and the site that they were cast at; ``None`` where values were made, or cannot be codes."""
        if self._cast is None or self._value is not None:
            return None
        if self._encoded is None and self._chain is not None:
            self._encoded = self._cast.codes(self._chain)
            self._chain = None if self._encoded is not None else self._chain
        return None if self._encoded is None else (self._encoded, self._cast.site)

    def then(self, cast: Cast) -> Pending:
        """This and a cast."""
        chain = self._uncast()
        return Pending(Chain(self.values()), cast, owned=False) if chain is None else Pending(chain, cast, self.owned)

    def _uncast(self) -> Chain | None:
        """The operations with the cast as their first rounding; ``None`` if they cannot be joined any more."""
        chain, cast = self._chain, self._cast
        if chain is None or cast is None:
            return chain
        return Chain(chain.raw, cast.fmt) if chain.bare else None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        special = _SPECIAL.get(func)
        joined = None if special is None else special(*args, **(kwargs or {}))
        if joined is not None:
            return joined
        out = func(*tree_map_only(Pending, _values, args), **tree_map_only(Pending, _values, dict(kwargs or {})))
        if _writes(func) and isinstance(args[0], Pending) and out is args[0]._value:
            return args[0]
        return out


def _values(x: Pending) -> Tensor:
    return x.values()


def settled(x: Any) -> Any:
    """The values of what waits; anything else as it is."""
    return x.values() if isinstance(x, Pending) else x


@cache
def _writes(func: Any) -> bool:
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)


def _relu(x: Tensor) -> Tensor | None:
    chain = x._uncast() if isinstance(x, Pending) else None
    return None if chain is None else Pending(chain.with_relu())


def _relu_(x: Tensor) -> Tensor | None:
    chain = x._uncast() if isinstance(x, Pending) else None
    if chain is None or not isinstance(x, Pending):
        return None
    x._chain, x._cast = chain.with_relu(), None
    return x


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool,
    momentum: float, eps: float, cudnn: bool = False,
) -> Tensor | None:  # fmt: skip
    chain = x._uncast() if isinstance(x, Pending) else None
    if chain is None or training or mean is None or var is None:
        return None
    weight, bias = (None if p is None else plain(settled(p)) for p in (weight, bias))
    longer = chain.with_norm(Norm(mean, var, weight, bias, eps))
    return None if longer is None else Pending(longer)


def _native_batch_norm(*args: Any) -> Any:
    out, mean = _batch_norm(*args), args[3]
    return None if out is None else (out, mean.new_empty(0), mean.new_empty(0))  # statistics, which nobody reads


def _clone(x: Tensor, *, memory_format: Any = None) -> Tensor | None:
    if not isinstance(x, Pending) or not x.waits or memory_format not in (None, torch.preserve_format):
        return None
    assert x._chain is not None
    return Pending(x._chain, x._cast)


def _detach(x: Tensor) -> Tensor | None:
    return x if isinstance(x, Pending) else None


def _copy_(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor | None:
    """Take over what waits in the source."""
    if not isinstance(x, Pending) or not isinstance(source, Pending) or x._value is not None:
        return None
    if source._value is not None or (x.shape, x.stride()) != (source.shape, source.stride()):
        return None
    x._chain, x._cast, x._encoded = source._chain, source._cast, source._encoded
    return x


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.relu.default: _relu,
    aten.relu_.default: _relu_,
    aten.batch_norm.default: _batch_norm,
    aten.native_batch_norm.default: _native_batch_norm,
    aten.clone.default: _clone,
    aten.detach.default: _detach,
    aten.copy_.default: _copy_,
}
