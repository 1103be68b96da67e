"""Parameters of a module as codes, and back: in place, one at a time, and as they are made."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from lightning_lpsgld.formats import FormatLike, NumberFormat, parse_format
from lightning_lpsgld.ops.coded import CodedTensor, initialization

__all__ = ["code_parameters_", "float_parameters_", "parameters_made_as_codes"]

#: Says of a parameter of a module (name within it, parameter) whether it becomes codes.
Chooses = Callable[[nn.Module, str, nn.Parameter], bool]


def _everything(module: nn.Module, name: str, param: nn.Parameter) -> bool:
    return param.is_floating_point()


@torch.no_grad()
def code_parameters_(
    module: nn.Module, fmt: FormatLike, chooses: Chooses = _everything, finer: FormatLike | None = None
) -> nn.Module:
    """Hold parameters as codes, rounded to nearest: new parameters under the old names, tied ones tied.

    An optimizer that holds the old ones has to be made anew.

    Args:
        module: The module, changed in place; ``state_dict`` keys stay.
        fmt: The grid.
        chooses: Which ones: called with a submodule, a name within it and the parameter; all floating ones by default.
        finer: Grid of the accumulators, where a sampler will keep such: they begin at the values as they are here.

    Returns:
        ``module``.

    Raises:
        RuntimeError: If a parameter carries hooks, which would be lost; nothing has been changed then.
        TypeError, ValueError: If the grid is wider than a parameter's dtype.

    Example:
        >>> layer = code_parameters_(nn.Linear(64, 64), "bfp8")
        >>> layer.weight.nbytes_stored
        4160
    """
    number = parse_format(fmt)
    places = [place for place in _places(module) if not isinstance(place[2], CodedTensor) and chooses(*place)]
    for owner, name, param in places:
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            raise RuntimeError(
                f"`{name}` of a {type(owner).__name__} carries gradient hooks, which codes in its place would not "
                "have. Register them after the parameters became codes, or use storage='float'."
            )
    done: dict[int, nn.Parameter] = {}
    for owner, name, param in places:
        _replace(owner, name, param, done, lambda old: CodedTensor.of(old.data, number, finer))
    return module


@torch.no_grad()
def float_parameters_(module: nn.Module) -> nn.Module:
    """Undo :func:`code_parameters_`: parameters are floats again, with the values that they had.

    Args:
        module: The module, changed in place.

    Returns:
        ``module``.

    Example:
        >>> layer = float_parameters_(code_parameters_(nn.Linear(2, 1), "bfp8"))
        >>> type(layer.weight.data) is torch.Tensor
        True
    """
    done: dict[int, nn.Parameter] = {}
    for owner, name, param in _places(module):
        if isinstance(param, CodedTensor):
            _replace(owner, name, param, done, lambda old: old.decoded())  # type: ignore[attr-defined]
    return module


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for part in module.modules():
        for name, param in list(part._parameters.items()):
            if param is not None:
                yield part, name, param


def _replace(
    owner: nn.Module, name: str, param: nn.Parameter, done: dict[int, nn.Parameter], make: Callable[[Tensor], Tensor]
) -> None:
    new = done.get(id(param))
    if new is None:
        new = done[id(param)] = nn.Parameter(make(param), requires_grad=param.requires_grad)
        done[-id(param)] = param  # kept until all are replaced, so that no other gets its id
    setattr(owner, name, new)


@contextmanager
def parameters_made_as_codes(
    fmt: FormatLike, chooses: Chooses = _everything, finer: FormatLike | None = None
) -> Iterator[None]:
    """Within this, the parameters of every module that is made become codes as soon as it is put into another one.

    So a network is built of which only one part at a time is floats. Initial values are those that floats would have
    had, rounded once, as long as one tensor after the other is initialized. Parameters of the outermost module, and of
    modules that are in a plain list, become codes when the block ends.

    Args:
        fmt: The grid.
        chooses: As for :func:`code_parameters_`.
        finer: Likewise.

    Example:
        >>> with parameters_made_as_codes("bfp8"):
        ...     net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> str(net[0].weight.format)
        'bfp8'
    """
    number: NumberFormat = parse_format(fmt)
    made: list[weakref.ref[nn.Module]] = []

    def joined(module: nn.Module, name: str, child: nn.Module) -> None:
        if isinstance(child, nn.Module):
            code_parameters_(child, number, chooses, finer)

    def registered(module: nn.Module, name: str, param: nn.Parameter) -> None:
        if isinstance(param, nn.Parameter) and not isinstance(param, CodedTensor):
            made.append(weakref.ref(module))

    with ExitStack() as stack:
        stack.enter_context(initialization())
        for register, hook in (
            (nn_module.register_module_module_registration_hook, joined),
            (nn_module.register_module_parameter_registration_hook, registered),
        ):
            stack.callback(register(hook).remove)  # type: ignore[arg-type]
        yield
        left = [module for ref in made if (module := ref()) is not None]
        for module in left:
            code_parameters_(module, number, chooses, finer)
