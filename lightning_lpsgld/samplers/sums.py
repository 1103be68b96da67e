"""Where the steps of a sampler are summed, and on which grids weights, sums and gradients lie."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.arguments import require_flag
from lightning_lpsgld.formats import FormatLike, NumberFormat, check_dtype, parse_accumulator, parse_format
from lightning_lpsgld.ops import CodedTensor, quantize
from lightning_lpsgld.ops.spec import Accumulation
from lightning_lpsgld.samplers.base import LangevinOptimizer
from lightning_lpsgld.samplers.coded_state import begun, coded, decoded, held
from lightning_lpsgld.samplers.shards import apply_to_whole_blocks_
from lightning_lpsgld.samplers.step_size import StepSize

__all__ = ["SummingSampler"]


class SummingSampler(LangevinOptimizer):
    """Formats and accumulators of a sampler; arguments as :class:`.options.GridOptions` has them.

    Raises:
        TypeError, ValueError: If a format is none, is wider than a parameter's dtype, or an accumulator has a format
            and the weights have none.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        num_data: int,
        schedule: StepSize | None,
        check_finite: bool,
        weight_format: FormatLike | None,
        gradient_format: FormatLike | None,
        accumulator: FormatLike,
        variance_corrected: bool,
        full_precision: Iterable[Tensor],
    ) -> None:
        self.weight_format: NumberFormat | None = None if weight_format is None else parse_format(weight_format)
        self.gradient_format: NumberFormat | None = None if gradient_format is None else parse_format(gradient_format)
        self.accumulator = parse_accumulator(accumulator)
        self.accumulator_format = None if isinstance(self.accumulator, str) else self.accumulator
        if self.accumulator_format is not None and self.weight_format is None:
            raise ValueError(
                f"`accumulator` is {self.accumulator_format}, and the weights, its rounded view, have no format. Give "
                f"`weight_format`, or leave `accumulator` at 'low' and take weight_format='{self.accumulator_format}'."
            )
        self.variance_corrected = require_flag("variance_corrected", variance_corrected)
        self.full_precision = set(full_precision)
        self._frozen: set[Tensor] = set()
        super().__init__(params, defaults, num_data=num_data, schedule=schedule, check_finite=check_finite)
        for param in set(self._indices) - self.full_precision:
            self._check_dtypes(param)

    # --------------------------------------------------------------------------------------------------------- facts

    def accumulation(self, param: Tensor) -> Accumulation:
        """How the steps of a parameter are summed and rounded."""
        if self.format_of(param) is None:
            return "float"
        if self.accumulator == "full":
            return "full"
        return "vc" if self.variance_corrected else "naive"

    def keeps_sum(self, param: Tensor) -> bool:
        """Whether the steps of a parameter are summed beside it, so that it is only the rounded view of that sum."""
        return self.accumulator != "low" and self.format_of(param) is not None

    def _grid_of(self, accumulation: Accumulation) -> NumberFormat | None:
        """Grid onto which a step that is summed in this way rounds: that of the sum where it has one."""
        if accumulation == "float":
            return None
        return self.weight_format if accumulation == "full" else self.accumulator_format or self.weight_format

    def sum_format_of(self, param: Tensor) -> NumberFormat | None:
        """Grid on which the steps of a parameter are summed, ``None`` where they are in full precision."""
        fmt = self.format_of(param)
        return fmt if fmt is None or self.accumulator == "low" else self.accumulator_format

    def format_of(self, param: Tensor) -> NumberFormat | None:
        """Grid on which a parameter lies, ``None`` where it is not rounded.

        A frozen weight (``requires_grad=False``) that :meth:`round_parameters_` found off the grid lies on none until
        it is first moved.
        """
        left_alone = param in self.full_precision or param in self._frozen or param not in self._indices
        return None if left_alone else self.weight_format

    def gradient_format_of(self, param: Tensor) -> NumberFormat | None:
        """Grid of a parameter's gradient, ``None`` where it is not rounded; parameters exempt by name are exempt."""
        exempt = param in self.full_precision and self.weight_format is not None
        return None if exempt else self.gradient_format

    @property
    def formats(self) -> dict[str, str]:
        """Role of each rounded quantity and its format, for display."""
        pairs = {
            "weights": self.weight_format, "accumulators": self.accumulator_format, "gradients": self.gradient_format,
        }  # fmt: skip
        return {role: str(fmt) for role, fmt in pairs.items() if fmt is not None}

    # -------------------------------------------------------------------------------------------------------- sums

    def _check_dtypes(self, param: Tensor) -> None:
        for fmt in (self.weight_format, self.gradient_format):
            if fmt is not None:
                check_dtype(fmt, param.dtype)
        if self.accumulator_format is not None:
            check_dtype(self.accumulator_format, torch.promote_types(param.dtype, torch.float32))

    def accumulator_of(self, param: Tensor) -> Tensor:
        """The sum of a parameter's steps: the parameter itself, or what is kept beside it, float32 or wider.

        A tensor of the state, not a copy; begun at the parameter's value when it is first asked for. Of a parameter
        that is held as codes it is codes, too.
        """
        if not self.keeps_sum(param):
            return param
        state = self.state[param]
        if "accumulator" not in state:
            state["accumulator"] = self._begun(param)
        accumulator: Tensor = state["accumulator"]
        return accumulator

    @torch.no_grad()
    def _begun(self, param: Tensor) -> Tensor:
        """A sum that has the value of its parameter."""
        if isinstance(param, CodedTensor) and self.accumulator_format is not None:
            return begun(param, self.accumulator_format)
        wide = torch.promote_types(param.dtype, torch.float32)
        total = param.detach().to(wide, copy=True, memory_format=torch.preserve_format)
        if self.accumulator_format is not None:
            fmt = self.accumulator_format
            apply_to_whole_blocks_(total, fmt, partial(quantize, fmt=fmt, rounding="nearest"))
        return total

    # ------------------------------------------------------------------------------------------------- saved state

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`LangevinOptimizer.state_dict`; accumulators on a grid are saved as codes."""
        saved = super().state_dict()
        if self.accumulator_format is None:
            return saved
        params = [param for group in self.param_groups for param in group["params"]]
        return coded(saved, [self.sum_format_of(param) for param in params])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`LangevinOptimizer.load_state_dict`."""
        super().load_state_dict(decoded(state_dict))
        self._hold_sums(self.state)

    def _hold_sums(self, params: Iterable[Tensor]) -> None:
        """Keep sums in the form that their parameters have, codes or floats."""
        for param in params:
            state = self.state.get(param, {})
            if "accumulator" in state:
                state["accumulator"] = held(param, state["accumulator"], self.sum_format_of(param))
