"""Which parameters of a module are sampled, trained and frozen, and which of its submodules are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.nn import Module
from torch.optim import Optimizer

from lightning_lpsgld.casting import matching_modules

__all__ = ["ParameterRule", "Parts", "frozen_modules", "matching_parameters", "parts_of"]

#: A pattern of ``fnmatch`` for the name of a parameter or of a module that holds it, or a type of modules.
ParameterRule = str | type[Module]


@dataclass(frozen=True)
class Parts:
    """The parameters of a module by what becomes of them; every name is in exactly one of the first three.

    Attributes:
        sampled: Names of the parameters that samplers move.
        trained: Names of those that the user's own optimizers move.
        frozen: Names of the others: in no optimizer, or without ``requires_grad``.
        chosen: Names that the user's choice covers, those of parameters that are frozen now among them.
        exempt: Names of the parameters that are never rounded.
    """

    sampled: tuple[str, ...]
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    chosen: tuple[str, ...]
    exempt: tuple[str, ...]


def matching_parameters(module: Module, rules: Sequence[ParameterRule], argument: str) -> tuple[str, ...]:
    """Names of the parameters that rules select, in the module's order.

    Args:
        module: Any module.
        rules: Patterns for names of parameters (``"head.*"``, ``"*lora*"``) or of modules that hold them (``"head"``),
            and module types.
        argument: Name of the argument, for messages.

    Raises:
        TypeError: If a rule is neither a string nor a module type.
        ValueError: If a rule matches no parameter.

    Example:
        >>> from torch import nn
        >>> matching_parameters(nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1)), [nn.LayerNorm, "0.bias"], "sampled")
        ('0.bias', '1.weight', '1.bias')
    """
    named = dict(module.named_parameters())
    found: set[str] = set()
    for rule in rules:
        if isinstance(rule, type) and issubclass(rule, Module):
            held = {id(p) for child in module.modules() if isinstance(child, rule) for p in child.parameters()}
            matched = {name for name, param in named.items() if id(param) in held}
        elif isinstance(rule, str):
            matched = {name for name in named if any(fnmatchcase(prefix, rule) for prefix in _prefixes(name))}
        else:
            raise TypeError(f"`{argument}` takes patterns of names and types of modules, got {rule!r}.")
        if not matched:
            some = ", ".join(list(named)[:3])
            raise ValueError(
                f"`{argument}`: {rule!r} matches no parameter of {type(module).__name__}, whose parameters are called "
                f"{some}, ... Patterns are those of fnmatch, e.g. 'head.*' or '*lora*'."
            )
        found |= matched
    return tuple(name for name in named if name in found)


def _prefixes(name: str) -> list[str]:
    """The name of a parameter, and those of the modules that hold it."""
    steps = name.split(".")
    return [".".join(steps[:n]) for n in range(len(steps), 0, -1)]


def parts_of(
    module: Module,
    optimizers: Sequence[Optimizer],
    sampled: Sequence[ParameterRule] | None,
    exclude: Sequence[ParameterRule],
) -> Parts:
    """Sort the parameters of a module.

    Args:
        module: The module.
        optimizers: Its optimizers.
        sampled: Rules of what is sampled; ``None``: all that the optimizers hold.
        exclude: Rules of the submodules that stay in full precision.

    Raises:
        RuntimeError: If nothing that is to be sampled is trainable.
        ValueError: If a rule matches nothing.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    named = dict(module.named_parameters())
    chosen = tuple(named) if sampled is None else matching_parameters(module, sampled, "sampled")
    excluded = {
        id(p)
        for name in matching_modules(module, exclude)
        for p in module.get_submodule(name).parameters(recurse=False)
    }
    moved = [name for name, p in named.items() if id(p) in held and p.requires_grad]
    names = set(chosen)
    if sampled is not None and not names.intersection(moved):
        raise RuntimeError(
            f"LowPrecisionSGLD: nothing that sampled={sampled!r} names can be sampled: no optimizer holds "
            f"{', '.join(chosen[:3])} with requires_grad=True. Unfreeze it, or give it to the optimizer."
        )
    return Parts(
        sampled=tuple(name for name in moved if name in names),
        trained=tuple(name for name in moved if name not in names),
        frozen=tuple(name for name in named if name not in set(moved)),
        chosen=chosen,
        exempt=tuple(name for name, p in named.items() if id(p) in excluded),
    )


def frozen_modules(module: Module) -> list[str]:
    """Names of the submodules nothing of which is trained; one without parameters goes with the module around it.

    A module that is frozen as a whole says nothing of what will be trained: then there are none.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.ReLU()).requires_grad_(False), nn.Linear(1, 1))
        >>> frozen_modules(net)
        ['0', '0.0', '0.1']
    """
    state = {name: {p.requires_grad for p in child.parameters()} for name, child in module.named_modules()}
    if True not in state[""]:
        return []

    def is_frozen(name: str) -> bool:
        return state[name] == {False} or (not state[name] and name != "" and is_frozen(name.rpartition(".")[0]))

    return [name for name in state if is_frozen(name)]
