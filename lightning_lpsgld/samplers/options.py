"""The keyword arguments that samplers share: typed and documented once, passed on by each."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor
from typing_extensions import TypedDict

from lightning_lpsgld.formats import FormatLike
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.samplers.step_size import StepSize

__all__ = ["CentredOptions", "GridOptions", "SamplerOptions", "accepted_options", "written_out"]


class SamplerOptions(TypedDict, total=False):
    r"""What every sampler of the package takes by keyword, beside N; defaults are those of its base class.

    Args:
        temperature: T >= 0; the target is :math:`p(\theta \mid D)^{1/T}`. 1 samples the posterior, 0 optimizes.
        weight_decay: λ >= 0; the Gaussian prior it implies has variance T/(Nλ) per weight.
        gradient_format: Grid of the gradients (stochastic rounding); ``None``: not rounded.
        variance_corrected: Where the sum of the steps is kept on a grid, use Q^vc instead of adding noise and rounding.
        seed: An int in [0, 2**64). **Must be equal on all ranks of a replica group**, which then stay bit-identical.
        backend: For the ops; ``"auto"`` takes the fastest one.
        schedule: Factor on ``lr`` and gate of the noise, per step; see :mod:`.step_size`.
        full_precision: Parameters that are never rounded although there is a format.
        check_finite: Refuse a step whose loss or gradient is NaN or infinite.
    """

    temperature: float
    weight_decay: float
    gradient_format: FormatLike | None
    variance_corrected: bool
    seed: int
    backend: BackendName
    schedule: StepSize | None
    full_precision: Iterable[Tensor]
    check_finite: bool


class GridOptions(SamplerOptions, total=False):
    """What samplers with weights on a grid take besides: :class:`SGLD`, :class:`SGHMC`, :class:`PreconditionedSGLD`.

    Args:
        weight_format: Grid of the weights, e.g. ``"bfp8"`` or a format object; ``None``: not rounded.
        accumulator: ``"low"``: the weight itself stays on the grid. ``"full"``: steps are summed in a float32
            accumulator (in the state), and the weight is its stochastic rounding. A format, e.g. ``"bfp16"``: they are
            summed on that grid, under Q^vc unless ``variance_corrected=False``, and the weight is the stochastic
            rounding of the sum; see ``docs/accumulators.md``.
        prior_mean: Where weight decay pulls to: ``"zero"``, or ``"initial"``, the weights as they are at the first step
            or when they are brought onto the grid, before they are rounded. They are kept in the state.
    """

    weight_format: FormatLike | None
    accumulator: FormatLike
    prior_mean: Literal["zero", "initial"]


class CentredOptions(SamplerOptions, total=False):
    """What samplers with a centre take besides: :class:`SVRG`, :class:`HALP`. Their temperature is 0 by default.

    Args:
        num_data: N, number of training examples; only the noise depends on it.
        period: Steps between two centres in the Trainer; ``None``: one centre an epoch.
    """

    num_data: int
    period: int | None


#: What the plugin asks of any sampler, and the values at which one that does not know of the option does as asked.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "weight_format": (None,), "gradient_format": (None,), "accumulator": ("low",), "variance_corrected": (True, False),
    "prior_mean": ("zero",), "backend": ("auto",), "schedule": (None,), "full_precision": ([], (), None),
}  # fmt: skip


def written_out(cls: type) -> inspect.Signature:
    """Signature of a class whose constructor passes ``**options`` on to its base: with the base's keywords, by name.

    Example:
        >>> class Base:
        ...     def __init__(self, *, seed=0): ...
        >>> class Own(Base):
        ...     def __init__(self, lr, **options): super().__init__(**options)
        >>> str(written_out(Own))
        '(lr, *, seed=0)'
    """
    parameters: dict[str, inspect.Parameter] = {}
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        taken = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        own = not parameters
        for parameter in taken:
            by_keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            if by_keyword or (own and parameter.kind is not inspect.Parameter.VAR_KEYWORD):
                parameters.setdefault(parameter.name, parameter)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in taken):
            break
    return inspect.Signature(list(parameters.values()))


def accepted_options(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of a run that a sampler takes; the others are left out where that changes nothing.

    Args:
        cls: Class of a sampler.
        options: Keyword arguments, those of :class:`GridOptions` among them.

    Raises:
        TypeError: If an option that ``cls`` does not take asks for something.

    Example:
        >>> from lightning_lpsgld.samplers import SVRG
        >>> accepted_options(SVRG, {"temperature": 0.5, "accumulator": "low"})
        {'temperature': 0.5}
    """
    known = inspect.signature(cls).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return dict(options)
    unknown = [name for name in options if name in _NEUTRAL and name not in known]
    for name in unknown:
        value = options[name]
        if not any(value is neutral or value == neutral for neutral in _NEUTRAL[name]):
            raise TypeError(
                f"{cls.__name__} takes no `{name}`, so {name}={_shown(value)} would do nothing. Let its constructor "
                f"take `{name}` (see docs/samplers.md), or do not ask for it: in LowPrecisionSGLD, "
                f"`{_IN_PLUGIN.get(name, name)}`."
            )
    return {name: value for name, value in options.items() if name not in unknown}


def _shown(value: Any) -> str:
    return (
        f"<{len(value)} parameters>"
        if isinstance(value, list)
        else repr(value if isinstance(value, str) else str(value))
    )


#: How to ask for nothing in the plugin.
_IN_PLUGIN = {
    "weight_format": "weights=None",
    "gradient_format": "gradients=None",
    "accumulator": "accumulator='low'",
    "prior_mean": "prior_mean='zero'",
    "backend": "backend='auto'",
    "schedule": "schedule=None",
    "full_precision": "exclude=()",
}
