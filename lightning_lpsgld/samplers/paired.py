"""What SGHMC and the preconditioned sampler share: a second tensor beside each weight, and one call that moves both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from lightning_lpsgld.ops.spec import PreconditionedSpec, UnderdampedSpec
from lightning_lpsgld.samplers.grid import GridSampler

__all__ = ["PairedSampler"]

Found = TypeVar("Found")
Spec = TypeVar("Spec", UnderdampedSpec, PreconditionedSpec)


class PairedSampler(GridSampler):
    """A sampler that keeps a velocity, or a running mean of squares, for every weight."""

    def _move(
        self,
        steps: Callable[..., Found],
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        specs: Sequence[Spec],
    ) -> Found:
        """Make a step of many tensors, each of the weight or of the sum of its steps; returns what ``steps`` does."""
        totals, full = [self.accumulator_of(p) for p in params], [spec.accumulation == "full" for spec in specs]
        if self.prior_mean != "zero":
            grads = [self.drift_of(group, param, grad) for param, grad in zip(params, grads)]
            specs = [replace(spec, weight_decay=0.0, gradient_format=None) for spec in specs]
        return steps(
            [param if kept else total for param, total, kept in zip(params, totals, full)], states,
            [total if kept else None for total, kept in zip(totals, full)],
            grads, specs, [self._draw_key(group, p) for p in params], [self.index_of(p) for p in params], self.backend,
        )  # fmt: skip

    def _note_saturated(self, group: dict[str, Any], params: list[Tensor], counts: Tensor) -> None:
        """Add the views of sums on a grid to the counts of a step, and keep them."""
        for i, param in enumerate(params):
            if self.keeps_sum(param) and self.accumulation(param) != "full":
                counts[i] += self._look(group, [param])[0]
        self.saturated.append((params, counts))
