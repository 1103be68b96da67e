"""What a plan says: one row per layer, one verdict for the run, and how they are printed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_lpsgld.analysis.budget import BudgetUpdate, VarianceBudget
from lightning_lpsgld.analysis.shrinkage import Shrinkage
from lightning_lpsgld.formats import Accumulator, NumberFormat

__all__ = ["HEADS", "TOLERANCE", "LayerPlan", "Plan"]

#: A layer whose noise is within this factor of the target is left alone.
TOLERANCE = 1.1


@dataclass(frozen=True)
class LayerPlan:
    """One parameter tensor.

    Attributes:
        name: As in ``named_parameters``.
        shape: Of the tensor.
        largest: Largest |θ|.
        fraction_length: Largest F of a fixed point of the format's word length that clips nothing.
        clipped: Share of elements outside the range of the format.
        gradient_rms: Root mean square of the batch gradient.
        shrinkage: Of the gradient in the gradient format, rounded to nearest; ``None`` without one.
        budgets: Noise against target, one per looked-at learning rate.
        gradient_noise: Variance that stochastic rounding of the gradient adds to a step, over the target, likewise.
        effective_temperature: Mean over the schedule of T·(achieved/target + gradient_noise).
        weight_bytes: Codes and shared exponents.
        accumulator_bytes: Of what is kept beside the weights, if anything.
        remedy_bits: Bits of ``least`` where it is of the kind of the grid in use; else ``None``: no longer word helps.
        verdict: One sentence.
        least: Narrowest grid of sums that meets the target: that in use, else the shortest longer word of the same kind
            (blocks, where it is a kind of floats); ``None`` if none up to 24 bits does.
    """

    name: str
    shape: tuple[int, ...]
    largest: float
    fraction_length: int
    clipped: float
    gradient_rms: float
    shrinkage: Shrinkage | None
    budgets: tuple[VarianceBudget, ...]
    gradient_noise: tuple[float, ...]
    effective_temperature: float
    weight_bytes: int
    accumulator_bytes: int
    remedy_bits: int | None
    verdict: str
    least: NumberFormat | None = None

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def row(self) -> tuple[str, ...]:
        """Cells of the printed table; heads in :data:`HEADS`."""
        first, last = self.budgets[0], self.budgets[-1]
        return (
            self.name,
            "x".join(map(str, self.shape)) or "1",
            f"{self.largest:.3g}",
            str(self.fraction_length),
            f"{self.clipped:.2%}",
            f"{self.gradient_rms:.2e}",
            "-" if self.shrinkage is None else f"{float(self.shrinkage.projection):.2f}",
            f"{float(first.high):.0%}/{float(first.low):.0%}/{float(first.unreachable):.0%}",
            f"{float(first.ratio):.3g}..{float(last.ratio):.3g}",
            f"{max(self.gradient_noise):.2g}",
            f"{self.effective_temperature:.2e}",
            str(self.weight_bytes + self.accumulator_bytes),
            self.verdict,
        )


#: Heads of the columns of the plan's table.
HEADS = (
    "parameter",
    "shape",
    "max",
    "F",
    "clipped",
    "grad rms",
    "q nearest",
    "high/low/out of reach",
    "noise/target",
    "Q_G/target",
    "T eff",
    "bytes",
    "verdict",
)


@dataclass(frozen=True)
class Plan:
    """What a run would do; ``print(plan)`` shows it.

    Attributes:
        layers: One per trainable parameter.
        weights: Format of the weights.
        gradients: Format of the gradients.
        update: How the sum is kept: ``"vc"``, ``"naive"`` or ``"full"``.
        temperature: T asked for.
        num_data: N.
        learning_rates: The looked-at points of the schedule.
        samples: Posterior samples to be kept.
        accumulator: Where the steps are summed.
    """

    layers: tuple[LayerPlan, ...]
    weights: NumberFormat
    gradients: NumberFormat | None
    update: BudgetUpdate
    temperature: float
    num_data: int
    learning_rates: tuple[float, ...]
    samples: int
    accumulator: Accumulator = "low"

    @property
    def least_accumulator(self) -> NumberFormat | None:
        """Narrowest grid of sums on which every layer gets the noise it asks for; ``None`` if no such is known."""
        least = [layer.least for layer in self.layers]
        found = [fmt for fmt in least if fmt is not None]
        return max(found, key=lambda fmt: fmt.bits) if len(found) == len(least) else None

    @property
    def effective_temperature(self) -> float:
        """Over all elements, by noise power at each point of the schedule, then averaged over the points."""
        ratios = []
        for i in range(len(self.learning_rates)):
            achieved = sum(
                float(layer.budgets[i].achieved + layer.gradient_noise[i] * layer.budgets[i].target) * layer.count
                for layer in self.layers
            )
            target = sum(float(layer.budgets[i].target) * layer.count for layer in self.layers)
            ratios.append(1.0 if achieved == target else achieved / target if target else math.inf)
        return self.temperature * sum(ratios) / len(ratios)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as codes and exponents."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of all accumulators."""
        return sum(layer.accumulator_bytes for layer in self.layers)

    @property
    def sample_bytes(self) -> int:
        """Bytes of all samples that are to be kept."""
        return self.samples * self.weight_bytes

    @property
    def verdict(self) -> str:
        """The whole run in one or two sentences."""
        worst = max(self.layers, key=lambda layer: layer.effective_temperature)
        fixed = self.weights.gap is not None
        clipped = [layer.name for layer in self.layers if fixed and layer.clipped > 0]
        sums = "" if isinstance(self.accumulator, str) else f", sums {self.accumulator}"
        text = f"{self.weights} ({self.update}{sums}) samples at T = {self.effective_temperature:.3g}"
        text += f", asked for {self.temperature:.3g}"
        text += f"; hottest: {worst.name} at {worst.effective_temperature:.3g}." if self._hot() else "."
        if clipped:
            text += f" {len(clipped)} tensors are clipped, first {clipped[0]}."
        if self._hot():
            text += f" {self._advice()}"
        return text

    def _hot(self) -> bool:
        return any(layer.effective_temperature > TOLERANCE * self.temperature for layer in self.layers)

    def _advice(self) -> str:
        least = self.least_accumulator
        options = ['accumulator="full"']
        if least is not None:
            options.insert(0, f'accumulator="{least}" ({-(-least.bits // 8)} bytes a weight)')
        if self.update == "naive":
            options.append("variance_corrected=True")
        if least is not None and self.accumulator == "low" and type(least) is type(self.weights):
            options.append(f"{least.bits}-bit weights")
        if self.update == "vc":
            options.append("a higher temperature (rounding noise is then part of it)")
        return "To get there: " + " or ".join(options) + "."

    def __str__(self) -> str:
        rows = [HEADS, *(layer.row() for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        total = 4 * sum(layer.count for layer in self.layers)
        memory = (
            f"bytes: weights {self.weight_bytes}, accumulators {self.accumulator_bytes}, {self.samples} samples "
            f"{self.sample_bytes}; one fp32 copy {total}"
        )
        rates = f"lr {self.learning_rates[0]:.3g} .. {self.learning_rates[-1]:.3g}, N = {self.num_data}"
        return "\n".join([*lines, rates, memory, self.verdict])
