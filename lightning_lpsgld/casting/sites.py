"""Which submodules are cast: chosen by type and by name, refused when the choice says nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, Union

from torch import nn
from torch.nn.modules import activation as _activation
from torch.nn.modules.conv import _ConvNd

__all__ = [
    "ACTIVATION_TYPES",
    "FRESH_TYPES",
    "LAYER_TYPES",
    "ModuleRule",
    "Site",
    "SitePlan",
    "find_sites",
    "matching_modules",
]

#: A module type, or an ``fnmatch`` pattern for the dotted name of a module or of one of its ancestors.
ModuleRule = Union[type, str]

#: Layers with weights whose outputs are cast.
LAYER_TYPES: tuple[type[nn.Module], ...] = (
    _ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)

#: Those of them whose outputs are memory of their own.
FRESH_TYPES: tuple[type[nn.Module], ...] = (_ConvNd, nn.Linear)

#: Softmax-like modules are no sites: they end a network or weight an average, and 8-bit blocks would zero small odds.
_NO_ACTIVATIONS = {"MultiheadAttention", "Softmax", "Softmax2d", "LogSoftmax", "Softmin"}
#: Modules of torch that are activations, by what they are called there.
ACTIVATION_TYPES: tuple[type[nn.Module], ...] = tuple(
    getattr(_activation, name) for name in _activation.__all__ if name not in _NO_ACTIVATIONS
)

Kind = Literal["layer", "activation"]


@dataclass(frozen=True)
class Site:
    """A submodule whose output is cast.

    Attributes:
        name: Dotted name in the root module; the first one, if it has several.
        kind: ``"layer"`` or ``"activation"``.
        type_name: Name of the module's class.
    """

    name: str
    kind: Kind
    type_name: str


@dataclass
class SitePlan:
    """What :func:`find_sites` decided, by module name.

    Attributes:
        sites: Submodules whose output is cast.
        containers: Modules that hold a layer (the root, blocks, sequences): they bound a forward call.
        excluded: Submodules inside which nothing is cast, functional activations included.
        opaque: Submodules that hooks or a torch-function mode cannot look into, with the reason.
        heads: Attention layers inside which the heads' results are cast on their way into ``out_proj``.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    containers: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)


def _matches(rule: ModuleRule, module: nn.Module, names: Sequence[str]) -> bool:
    if isinstance(rule, type):
        return isinstance(module, rule)
    return any(fnmatchcase(name, rule) for name in names)


def _names_of(root: nn.Module) -> dict[nn.Module, list[str]]:
    """Every submodule with all of its names (a shared one has several)."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _selected(
    argument: str, rules: Iterable[ModuleRule], names: dict[nn.Module, list[str]], *, below: bool
) -> set[nn.Module]:
    """Modules that a rule selects, with everything below them (for types: only if ``below``).

    Raises:
        ValueError: If a rule selects nothing.
        TypeError: If a rule is neither a module type nor a pattern.
    """
    chosen: set[nn.Module] = set()
    for rule in rules:
        if not isinstance(rule, (str, type)):
            raise TypeError(f"`{argument}` takes module types and name patterns, got {rule!r}.")
        found = [module for module, known in names.items() if _matches(rule, module, known)]
        if not found:
            known = sorted(name for known in names.values() for name in known if name)
            raise ValueError(
                f"`{argument}` has {rule!r}, which matches no submodule. Submodules are called {known[:20]}"
                + (" and so on." if len(known) > 20 else ".")
            )
        for module in found:
            chosen.update(module.modules() if below or isinstance(rule, str) else [module])
    return chosen


def matching_modules(root: nn.Module, rules: Iterable[ModuleRule], argument: str = "exclude") -> set[str]:
    """Names of the submodules that rules select, with all that is below them.

    Args:
        root: Any module.
        rules: Module types and ``fnmatch`` patterns for dotted names.
        argument: Name of the argument, for messages.

    Returns:
        Dotted names; all of them for a module that has several.

    Raises:
        ValueError: If a rule matches nothing.
        TypeError: If a rule is neither a module type nor a string.

    Example:
        >>> sorted(matching_modules(nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.ReLU()), ["0"]))
        ['0', '0.0']
    """
    names = _names_of(root)
    chosen = _selected(argument, rules, names, below=True)
    return {name for module in chosen for name in names[module]}


def _is_outside(module: nn.Module) -> bool:
    """Whether a module is a loss or a metric, by its class."""
    if isinstance(module, nn.modules.loss._Loss):
        return True
    return any(base.__module__.split(".")[0] == "torchmetrics" for base in type(module).__mro__)


def _opaque_reason(module: nn.Module) -> str | None:
    name = type(module).__name__
    if name in ("RecursiveScriptModule", "TopLevelTracedModule", "ScriptModule", "TracedModule"):
        return "it is scripted: nothing inside it is cast"
    if name == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return (
            "it is compiled, which hides torch.nn.functional.tanh, sigmoid, hardsigmoid and hardswish and in-place "
            "functions of torch (torch.relu_): these are not cast inside it"
        )
    return None


def _kind(module: nn.Module) -> Kind:
    return "activation" if isinstance(module, ACTIVATION_TYPES) else "layer"


def find_sites(
    root: nn.Module, sites: Iterable[ModuleRule] | None = None, exclude: Iterable[ModuleRule] = ()
) -> SitePlan:
    """Choose the submodules of ``root`` whose outputs are cast.

    Args:
        root: Any module; not modified.
        sites: Module types and name patterns (``fnmatch``; ``"net.layer1*"``); those selected, and only those, are
            sites. A name selects the layers and activation modules below it too. ``None``: every convolution, linear,
            recurrent and attention layer and every activation module except softmax-like ones. A pattern that ends
            in ``out_proj`` and names that of an :class:`~torch.nn.MultiheadAttention` means what goes into it.
        exclude: Module types and name patterns to leave alone, with all that is below them. Losses and metrics are
            left alone anyway.

    Returns:
        The plan.

    Raises:
        ValueError: If a rule matches nothing, or no site is left.
        TypeError: If a rule is neither a module type nor a string.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(find_sites(net, exclude=["2"]).sites)
        ['0', '1']
    """
    names = _names_of(root)
    wanted = None if sites is None else _selected("sites", sites, names, below=False)
    types = LAYER_TYPES + ACTIVATION_TYPES + tuple(rule for rule in sites or () if isinstance(rule, type))
    excluded = _selected("exclude", exclude, names, below=True)
    for module in filter(_is_outside, names):
        excluded.update(module.modules())
    plan = SitePlan(opaque=_opaque(names))
    covered: set[nn.Module] = set()  # inside a site, or inside attention, which calls no hooks of its parts
    for module, known in names.items():
        if isinstance(module, nn.MultiheadAttention):
            covered.update(_below(module))
        if module in excluded:
            plan.excluded.append(known[0])
        elif module in covered or not isinstance(module, types):
            continue
        elif wanted is None or module in wanted:
            plan.sites[known[0]] = Site(known[0], _kind(module), type(module).__name__)
            covered.update(_below(module))
        else:
            plan.excluded.append(known[0])  # not selected by `sites`: the function inside it is no site either
    if not plan.sites:
        raise ValueError(
            f"Activation casting matched no submodule of {type(root).__name__} (sites={sites!r}, exclude={exclude!r}): "
            "nothing would be rounded. Name the layers in `sites`, or turn activation and error rounding off."
        )
    plan.containers = _containers(names, plan, covered)
    asked = [rule for rule in sites or () if isinstance(rule, str) and rule.endswith("out_proj")]
    plan.heads = [
        known[0]
        for module, known in names.items()
        if isinstance(module, nn.MultiheadAttention)
        and known[0] in plan.sites
        and any(_matches(rule, module.out_proj, names[module.out_proj]) for rule in asked)
    ]
    return plan


def _below(module: nn.Module) -> set[nn.Module]:
    return {child for child in module.modules() if child is not module}


def _opaque(names: dict[nn.Module, list[str]]) -> dict[str, str]:
    """Outermost modules that cannot be looked into, with the reason."""
    found: dict[str, str] = {}
    for module, known in names.items():
        reason = _opaque_reason(module)
        if reason is not None and not any(not above or known[0].startswith(above + ".") for above in found):
            found[known[0]] = reason
    return found


def _containers(names: dict[nn.Module, list[str]], plan: SitePlan, covered: set[nn.Module]) -> list[str]:
    """Modules that are no site themselves and hold a layer."""
    settled = {*plan.sites, *plan.excluded}
    return [
        known[0]
        for module, known in names.items()
        if known[0] not in settled
        and module not in covered
        and any(isinstance(child, LAYER_TYPES) for child in module.modules())
    ]
