"""Which layers multiply codes: a torch-function mode that sees each product, decides how it runs, and keeps account."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lpsgld.arithmetic.capability import Capability, capability
from lightning_lpsgld.arithmetic.operands import WeightCodes, activation_scales, refusal_of_format
from lightning_lpsgld.arithmetic.products import Geometry, PackedWeight, Path, choose_path, exact_product
from lightning_lpsgld.arithmetic.report import ProductAccount
from lightning_lpsgld.ops import Encoded
from lightning_lpsgld.ops.attention import opened_attention

__all__ = ["ARITHMETICS", "Arithmetic", "ArithmeticRefusal", "LayerArithmetic", "check_choice"]

#: ``"simulated"``: products of floats; ``"auto"``: of codes where that pays; ``"integer"``: of codes, or refused.
Arithmetic = Literal["simulated", "auto", "integer"]
#: The values of :data:`Arithmetic`.
ARITHMETICS: tuple[str, ...] = get_args(Arithmetic)

#: Below so many multiplications a product in integers costs more in calls than it saves.
_WORTHWHILE = 2**24

#: Attributes that hold the weight of a product, and what the product is called in its module.
_WEIGHTS = {
    "weight": "", "in_proj_weight": "in_proj", "q_proj_weight": "q_proj", "k_proj_weight": "k_proj",
    "v_proj_weight": "v_proj",
}  # fmt: skip

#: Finds the codes of a layer's input; the second value says why there are none, and ``""`` that none are expected.
CodesOf = Callable[[Tensor], "tuple[Encoded | None, str]"]


class ArithmeticRefusal(ValueError):
    """A layer cannot run in integers although that was asked for."""


def check_choice(owner: str, arithmetic: object) -> None:
    """Refuse an unknown value of an argument ``arithmetic``.

    Args:
        owner: Whose argument it is, for the message.
        arithmetic: Its value.

    Raises:
        ValueError: With the name, the rule and the value.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(
            f"{owner}: `arithmetic` must be one of {', '.join(map(repr, ARITHMETICS))}, got {arithmetic!r}."
        )


class LayerArithmetic:
    """How the linear and convolution layers of a module multiply.

    A layer runs in integers if its input carries codes of at most 8 bits (it is a cast tensor, or a view of one that
    keeps samples apart), and its weight lies on a grid of at most 8 bits per row. ``"auto"`` further wants a path of
    one product and enough work to pay for it; the choice depends on shapes, codes and the machine's features only, not
    on timing. Everything else is simulated: products of the same values in floats.

    Args:
        module: Whose layers; names are for reports.
        codes_of: Codes of a tensor, or why it has none.
        arithmetic: ``"auto"`` or ``"integer"``.
        machine: What can be used; this machine by default.

    Raises:
        ArithmeticRefusal: From a forward, with ``"integer"``, if a layer other than the first cannot run in integers.

    Example:
        >>> from lightning_lpsgld.ops import encode, quantize
        >>> layer, x = nn.Linear(4, 2), torch.tensor([[0.5, 1.0, -0.25, 0.0]])
        >>> _ = layer.weight.data.copy_(quantize(layer.weight.data, "bfp8", rounding="nearest"))
        >>> codes = encode(x, "bfp8", rounding="nearest")
        >>> arithmetic = LayerArithmetic(layer, lambda tensor: (codes, ""), "integer")
        >>> with torch.no_grad(), arithmetic.running():
        ...     same = torch.allclose(layer(x), layer.weight @ x[0] + layer.bias)
        >>> same, arithmetic.report()
        (True, {'': 'integer'})
    """

    def __init__(
        self, module: nn.Module, codes_of: CodesOf, arithmetic: Arithmetic, machine: Capability | None = None
    ) -> None:
        check_choice("LayerArithmetic", arithmetic)
        self.codes_of, self.arithmetic = codes_of, arithmetic
        self.machine = capability() if machine is None else machine
        self._names = {
            id(weight): ".".join(filter(None, (name, suffix)))
            for name, part in module.named_modules()
            for attribute, suffix in _WEIGHTS.items()
            if isinstance(weight := getattr(part, attribute, None), Tensor)
        }
        self._weights = WeightCodes()
        self._account = ProductAccount()
        self._mode = _ProductMode(self)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this, products of the module's layers are decided here, and counted anew."""
        self._account.begin()
        with self._mode:
            yield

    def report(self) -> dict[str, str]:
        """Layer -> ``"integer"`` if all of its products in the last :meth:`running` were, else why not."""
        return self._account.report()

    def product(self, call: _Call) -> Tensor | None:
        """Result of a product in integers; ``None`` if it is to be simulated.

        Raises:
            ArithmeticRefusal: If integers are demanded and not possible here.
        """
        owner = call.weight if id(call.weight) in self._names else call.weight._base  # of a slice, as attention takes
        name = self._names.get(id(owner), "a product outside of a module")
        result = self._attempt(call, None if id(owner) not in self._names else owner)
        if isinstance(result, str):
            first = result == ""
            self._account.note(name, "its input is the network's, which is not rounded" if first else result)
            if self.arithmetic == "integer" and not first:
                raise ArithmeticRefusal(
                    f"arithmetic='integer': layer {name!r} cannot run in integers: {result}. Use arithmetic='auto', "
                    "which simulates such layers."
                )
            return None
        self._account.note(name, "integer")
        return result

    def _attempt(self, call: _Call, owner: Tensor | None) -> Tensor | str:
        """The result, or why there is none; ``""`` for the network's first layer. ``owner``: what the weight is of."""
        x, weight = call.x, call.weight
        if call.geometry is None:
            return "its padding or its input's shape is none that integers cover"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast chooses its dtype"
        if self.arithmetic == "auto" and x.device.type != "cpu":  # before anything waits for the device
            return f"integers are no faster than floats on {x.device.type}"
        encoded, reason = self.codes_of(x)
        if encoded is None and call.geometry.kind == "linear" and x.ndim == 3:  # batch and time change places
            encoded, _ = self.codes_of(x.transpose(0, 1))
            if encoded is not None:
                out = self._attempt(call.swapped(), owner)
                return out if isinstance(out, str) else out.transpose(0, 1).contiguous()
        if encoded is None:
            return reason
        refusal = refusal_of_format(encoded.format)
        if refusal is not None:
            return refusal
        work = call.geometry.multiplications(x.shape, weight.shape)
        if self.arithmetic == "auto" and work < _WORTHWHILE:
            return "it is too small for integers to pay"
        packed = self._weights.of(weight, owner)
        if packed is None:
            return "its weight does not lie on a grid of 8 bits per row"
        return self._in_integers(call, encoded, packed)

    def _in_integers(self, call: _Call, encoded: Encoded, packed: PackedWeight) -> Tensor | str:
        geometry = call.geometry
        assert geometry is not None
        lowest = int(encoded.codes.amin())
        highest = encoded.format.code_range[1]
        path = choose_path(lowest, highest, packed, self.machine, call.x.device.type)
        if self.arithmetic == "auto" and path in ("split", "float64"):
            return f"integers are no faster than floats here ({path}; {self.machine})"
        return _run(call, encoded, packed, path)


class _Call:
    """Arguments of ``linear``, ``conv1d`` or ``conv2d`` in one form."""

    __slots__ = ("bias", "geometry", "weight", "x")

    def __init__(self, dims: int, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        batched = x.ndim >= 2 if dims == 0 else x.ndim == dims + 2
        self.geometry = geometry if batched else None

    def swapped(self) -> _Call:
        """The same linear product of an input whose first two dims have changed places."""
        return _Call(0, self.x.transpose(0, 1), self.weight, self.bias, self.geometry)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Call:
    return _Call(0, input, weight, bias, Geometry("linear"))


def _conv(dims: int) -> Callable[..., _Call]:
    def several(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dims if len(values) == 1 else values

    def read(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> _Call:  # fmt: skip
        steps, gaps = several(stride), several(dilation)
        if padding == "valid":
            padding = 0
        if padding == "same":
            around = [d * (k - 1) for d, k in zip(gaps, weight.shape[2:])]
            if any(total % 2 for total in around):
                return _Call(dims, input, weight, bias, None)
            padding = [total // 2 for total in around]
        geometry = Geometry("conv", steps, several(padding), gaps, groups)
        return _Call(dims, input, weight, bias, geometry)

    return read


#: How the arguments of each product are read.
_READERS: dict[Any, Callable[..., _Call]] = {F.linear: _linear, F.conv1d: _conv(1), F.conv2d: _conv(2)}


class _ProductMode(TorchFunctionMode):
    def __init__(self, owner: LayerArithmetic) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward and opened_attention() is not None:
            with self:  # its projections come back here, one by one
                return opened_attention()(*args, **(kwargs or {}))
        if func in _READERS:
            call = _READERS[func](*args, **(kwargs or {}))
            out = self.owner.product(call)
            if out is not None:
                return out
            if func is F.conv2d and not torch.is_grad_enabled() and call.x.ndim == 4:
                # What follows is in channels-last memory, as integer kernels read and write it.
                args, kwargs = (), {**_named(args), **(kwargs or {})}
                kwargs["input"] = call.x.contiguous(memory_format=torch.channels_last)
        return func(*args, **(kwargs or {}))


def _named(args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args))


def _run(call: _Call, encoded: Encoded, packed: PackedWeight, path: Path) -> Tensor:
    """The product in integers, with the derivative of the product in floats."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (call.x, call.weight, call.bias)):
        out: Tensor = _Product.apply(call.x, call.weight, call.bias, call, encoded, packed, path)  # type: ignore[no-untyped-call]
        return out
    return _forward(call, encoded, packed, path)


def _forward(call: _Call, encoded: Encoded, packed: PackedWeight, path: Path) -> Tensor:
    assert call.geometry is not None
    out = exact_product(encoded.codes, packed, call.geometry, path)
    scale = activation_scales(encoded, out.ndim)
    if call.bias is None:
        return out.mul_(scale)
    bias = call.bias.detach()
    if call.geometry.kind == "conv":
        bias = bias.view(-1, *[1] * (out.ndim - 2))
    return out.mul_(scale).add_(bias)


class _Product(torch.autograd.Function):
    """Forward in integers; backward in floats, as of the simulated product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, encoded: Encoded, packed: PackedWeight,
        path: Path,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.bias = call.geometry, bias is not None
        out = _forward(call, encoded, packed, path)
        return out.contiguous()  # draws and backward kernels are faster in row-major memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight), geometry = grads, ctx.saved_tensors, ctx.geometry
        needs = (*ctx.needs_input_grad[:2], ctx.bias and ctx.needs_input_grad[2])
        if geometry.kind == "conv":
            sizes = [weight.shape[0]] if ctx.bias else None
            parts = torch.ops.aten.convolution_backward(
                grad, x, weight, sizes, geometry.stride, geometry.padding, geometry.dilation, False,
                [0] * len(geometry.stride), geometry.groups, list(needs),
            )  # fmt: skip
            return (*parts, None, None, None, None)
        rows = grad.flatten(0, -2)
        by_x = grad @ weight if needs[0] else None
        by_weight = rows.t() @ x.flatten(0, -2) if needs[1] else None
        by_bias = rows.sum(0) if needs[2] else None
        return by_x, by_weight, by_bias, None, None, None, None
