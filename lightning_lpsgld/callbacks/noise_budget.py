r"""What a step's rounding does to the temperature, in numbers and in a plain verdict.

One step asks for noise of variance :math:`v = 2\eta T/N`; variance :math:`v'` is what temperature
:math:`T' = v' N / (2\eta)` would have asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_lpsgld.formats import (
    BlockFloatingPoint,
    NumberFormat,
)
from lightning_lpsgld.ops.crossing import crossing
from lightning_lpsgld.ops.reference import power_of_two, variance_plan
from lightning_lpsgld.ops.tops import chance_at_top
from lightning_lpsgld.samplers.statistics import StepStatistics

__all__ = ["Case", "LayerNoise", "expected_excess", "heating", "held_below", "overall", "remedies"]

#: Longest word that is suggested.
_LONGEST = 24


@dataclass(frozen=True)
class LayerNoise:
    """Statistics of one parameter's step and the conditions it was made under.

    Attributes:
        statistics: As the sampler measured them.
        temperature: T that was asked for (0 where the schedule was silent).
        lr: Step size η.
        weight_format: Grid of the parameter, if it has one.
    """

    statistics: StepStatistics
    temperature: float
    lr: float
    weight_format: NumberFormat | None = None

    @property
    def effective_temperature(self) -> float:
        """Temperature at which noise of the achieved variance would be right; NaN for a step of size 0."""
        return self.statistics.effective_temperature

    def quantities(self) -> dict[str, float]:
        """Numbers to log; ratios only where noise was asked for."""
        s = self.statistics
        values = {
            "effective_temperature": self.effective_temperature,
            "saturated": s.saturated,
            "unchanged": s.unchanged,
            "high": s.high,
            "low": s.low,
            "unreachable": s.unreachable,
        }
        if s.blocks:
            values.update(crossing=s.crossing, at_top=s.at_top, held=s.held)
        if s.target > 0:
            values["achieved_over_target"] = s.achieved / s.target
            values["gradient_rounding_over_target"] = s.gradient_rounding / s.target
            values["view_rounding_over_target"] = s.view_rounding / s.target
            values["bias_over_target"] = s.bias / s.target
            if not math.isnan(s.minibatch):
                values["minibatch_over_target"] = s.minibatch / s.target
        if s.velocity_target > 0:
            values["velocity_achieved_over_target"] = s.velocity_achieved / s.velocity_target
        return values


def _weighted(layers: Sequence[LayerNoise], value: Callable[[LayerNoise], float]) -> float:
    weights = sum(layer.statistics.numel for layer in layers)
    return math.fsum(layer.statistics.numel * value(layer) for layer in layers) / max(weights, 1)


def _over_blocks(layers: Sequence[LayerNoise]) -> dict[str, float]:
    """Shares of blocks, over all blocks of all layers that have some."""
    counts = [layer.statistics.blocks * layer.statistics.numel / max(layer.statistics.count, 1) for layer in layers]
    if not sum(counts):
        return {}
    return {
        name: math.fsum(n * getattr(layer.statistics, name) for n, layer in zip(counts, layers)) / sum(counts)
        for name in ("crossing", "at_top", "held")
    }


def overall(layers: Sequence[LayerNoise]) -> dict[str, float]:
    """The quantities of all layers together: means over elements (blocks, of theirs); ratios are ratios of means.

    Args:
        layers: At least one.

    Returns:
        The keys of :meth:`LayerNoise.quantities`.
    """
    shares = ("effective_temperature", "saturated", "unchanged", "high", "low", "unreachable")
    values = {name: _weighted(layers, lambda layer, name=name: layer.quantities()[name]) for name in shares}  # type: ignore[misc]
    values.update(_over_blocks(layers))
    target = _weighted(layers, lambda layer: layer.statistics.target)
    if target > 0:
        for name in ("achieved", "gradient_rounding", "view_rounding", "bias", "minibatch"):
            part = _weighted(layers, lambda layer, name=name: getattr(layer.statistics, name))  # type: ignore[misc]
            if not math.isnan(part):
                values[f"{name}_over_target"] = part / target
    velocity = _weighted(layers, lambda layer: layer.statistics.velocity_target)
    if velocity > 0:
        achieved = _weighted(layers, lambda layer: layer.statistics.velocity_achieved)
        values["velocity_achieved_over_target"] = achieved / velocity
    return values


def heating(layers: Sequence[LayerNoise]) -> float:
    """Effective over asked temperature: achieved over target variance, but where positions and velocities share it.

    Args:
        layers: At least one.

    Returns:
        NaN if no noise was asked for.
    """
    total = overall(layers)
    if "velocity_achieved_over_target" not in total:
        return total.get("achieved_over_target", math.nan)
    asked = _weighted(layers, lambda layer: layer.temperature)
    return total["effective_temperature"] / asked if asked > 0 else math.nan


def held_below(layers: Sequence[LayerNoise]) -> str | None:
    """A sentence if clamping holds more blocks at the top of their exponent than chance would.

    Args:
        layers: At least one.

    Returns:
        ``None`` if no format clamps, or blocks at the top are not more than twice as many as by chance (and five
        standard errors more).
    """
    for fmt in {layer.weight_format for layer in layers if layer.statistics.held > 0}:
        if fmt is None or not chance_at_top(fmt):
            continue
        own = [layer for layer in layers if layer.weight_format == fmt]
        blocks, chance = sum(layer.statistics.blocks for layer in own), chance_at_top(fmt)
        standing = sum(round(layer.statistics.at_top * layer.statistics.blocks) for layer in own)
        by_chance = blocks * chance
        if standing <= max(2 * by_chance, by_chance + 5 * math.sqrt(by_chance) + 5):
            continue
        total = overall(own)
        bias = ""
        if "bias_over_target" in total:
            bias = f" (mean square {total['bias_over_target']:.2g} times the variance asked for)"
        return (
            f"Held below a power of two: {100 * standing / blocks:.0f} % of {blocks} blocks stand at the top code of "
            f"{fmt}, {100 * chance:.2g} % would by chance. Codes are clamped there, so the mean of a step is off in "
            f"{100 * total['held']:.0f} % of the blocks{bias}, and no step smaller than a gap leads any further. "
            f"Use '{fmt.unclamped()}', in which such a block takes the next exponent."
        )
    return None


@dataclass(frozen=True)
class Case:
    """A tensor before rounding, for asking what another format or temperature would do to it.

    Attributes:
        mean: θ - η(g + λθ), where the step goes before noise and rounding.
        numel: Elements that ``mean`` stands for.
        lr: η.
        num_data: N.
        corrected: Whether rounding is variance-corrected; naive rounding adds its variance on top.
    """

    mean: Tensor
    numel: int
    lr: float
    num_data: int
    corrected: bool


def expected_excess(cases: Sequence[Case], fmt: NumberFormat, temperature: float) -> float:
    """Achieved over target variance of a step with ``fmt`` at ``temperature`` > 0, averaged over all elements."""
    target = achieved = 0.0
    for case in cases:
        v = 2.0 * case.lr * temperature / case.num_data
        plan = variance_plan(case.mean, v, fmt)
        gap = power_of_two(plan.gap_exponents) ** 2
        added = crossing(plan, fmt, case.mean.dtype, update="vc" if case.corrected else "naive").added * gap
        total = added + (plan.achieved * gap if case.corrected else plan.rounding * gap + v)
        target += case.numel * v
        achieved += case.numel * float(total.mean())
    return achieved / target if target > 0 else math.nan


def _temperature_ladder(temperature: float) -> list[float]:
    """1, 2, 5, 10, ... times a power of ten, above ``temperature``."""
    start = math.floor(math.log10(temperature))
    steps = [digit * 10.0**power for power in range(start, start + 9) for digit in (1.0, 2.0, 5.0)]
    return [step for step in steps if step > temperature * 1.0001]


def remedies(
    cases: Sequence[Case], fmt: NumberFormat, temperature: float, *, limit: float = 1.5, summed: bool = False
) -> list[str]:
    """What would bring the noise to at most ``limit`` times what was asked for, each found by trying it on ``cases``.

    Args:
        cases: Tensors of a measured step.
        fmt: The format in use.
        temperature: The temperature in use, > 0.
        limit: Largest acceptable achieved / target.
        summed: Whether ``fmt`` is that of an accumulator beside the weights.

    Returns:
        Phrases: variance correction where rounding is naive, longer words of the same kind, block floating point
        instead of fixed point, a higher temperature, the narrowest of these as an accumulator, and always the full one.
    """
    found = []
    corrected = [replace(case, corrected=True) for case in cases]
    if not all(case.corrected for case in cases) and expected_excess(corrected, fmt, temperature) <= limit:
        found.append("variance_corrected=True")
    kinds: list[NumberFormat] = [fmt]
    if fmt.gap is not None:
        kinds.append(BlockFloatingPoint(fmt.bits))
    wide: list[NumberFormat] = []
    for kind in kinds:
        enough = _enough(
            cases, kind, fmt.bits + (kind is fmt), temperature, limit
        )  # another kind may do at this length
        if enough is None:
            continue
        wide.append(enough)
        if not summed:
            found.append(enough.at_least())
    if wide:
        found.append(f"accumulator='{min(wide, key=lambda one: one.bits)}'")
    warm = (t for t in _temperature_ladder(temperature) if expected_excess(cases, fmt, t) <= limit)
    hot = next(warm, None)
    if hot is not None:
        found.append(f"T >= {hot:g}")
    return [*found, "accumulator='full'"]


def _enough(
    cases: Sequence[Case], kind: NumberFormat, shortest: int, temperature: float, limit: float
) -> NumberFormat | None:
    """Shortest word of a kind, from ``shortest`` on, whose excess is within the limit; of floats there is none."""
    longer = (kind.with_word_length(length) for length in range(shortest, _LONGEST + 1))
    return next((f for f in longer if f is not None and expected_excess(cases, f, temperature) <= limit), None)
