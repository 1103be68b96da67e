"""The temperature that the formats really sample at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_lpsgld.callbacks.noise_budget import Case, LayerNoise, heating, held_below, overall, remedies
from lightning_lpsgld.callbacks.tables import log_table
from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops.coded import plain
from lightning_lpsgld.samplers import SGLD
from lightning_lpsgld.samplers.grid import GridSampler
from lightning_lpsgld.samplers.in_backward import first_rows
from lightning_lpsgld.samplers.updates import descend

__all__ = ["EffectiveTemperature"]

#: Achieved over target variance above which a format is said not to carry the temperature.
_LIMIT = 1.5
#: Elements of each tensor with which remedies are tried.
_TRIAL_ELEMENTS = 2048

_Conditions = tuple[float, float, NumberFormat | None]


class EffectiveTemperature(Callback):
    r"""Measure the noise that the sampler's rounding really injects, and say so if it is not what was asked for.

    One step asks for variance :math:`v = 2\eta T/N`. Where stochastic rounding alone has more,
    :math:`p(1-p)\Delta^2 > v`, no unbiased rounding can deliver :math:`v`, and the chain runs at a higher temperature
    than it was told to:

    .. math::
        T_\mathrm{eff} = \frac{N}{2\eta}\,\overline{\mathrm{Var}[\theta_{new} \mid \theta, g]}

    On each measured step these are logged, over all elements and per parameter (``noise/<quantity>/<parameter>``):

    * ``noise/effective_temperature`` and ``noise/achieved_over_target``;
    * ``noise/saturated``: share of the elements outside the range of their format;
    * ``noise/unchanged``: share that the step leaves exactly where it was (zero updates);
    * ``noise/high``, ``noise/low``, ``noise/unreachable``: share in each regime of the variance-corrected quantizer;
    * ``noise/gradient_rounding_over_target``: what rounding the gradient adds, not part of the achieved variance;
    * ``noise/view_rounding_over_target``: variance of the rounded weight around its accumulator;
    * ``noise/minibatch_over_target``: what the noise of the mini-batch gradient adds, from the difference to the
      gradient of the step before; not part of the achieved variance. From the second step on;
    * of block formats, ``noise/crossing``: share of the blocks that the step is expected to take to the next exponent
      (what that adds is in the achieved variance); ``noise/at_top``: share whose largest code is the last one below a
      power of two; ``noise/held``: share in which a clamp moves the mean of an element;
    * ``noise/bias_over_target``: mean square of what clamps move means by;
    * ``noise/velocity_achieved_over_target``: of SGHMC, whose other quantities are those of the position.

    Under preconditioning the noise of a weight has the variance vG, and means are over weights. SGHMC adds noise to
    positions and velocities, and only little to the former, so that a position's ratio says nothing by itself: there
    the effective temperature is the one that slow directions get from both, :mod:`.underdamped_statistics`.

    Ratios are left out for steps that ask for no noise. The chain is not changed by measuring, and the measurement of a
    step does not depend on gradient accumulation. All numbers of the last measurement are in :attr:`table`.

    **Where the promise stops.** The noise of the mini-batch gradient is reported beside it, not in it; of full batches
    the weights' own move between two steps is what is left in that number. Large tensors are measured
    on a subset of their rows. On a sharded parameter it is this rank's shard. Remedies are tried for SGLD only.

    Args:
        every_n_steps: Measure steps 0, n, 2n, ... of each sampler.
        max_elements: Larger tensors are measured on evenly spaced rows with about so many elements.
        verdict: Warn once, with what would help, when the achieved variance (SGHMC: effective temperature) exceeds
            1.5 times the target; and once, when a format that clamps holds blocks below a power of two.

    Raises:
        ValueError: If an argument is not an int >= 1.
        RuntimeError: When training starts, if no optimizer of the trainer is a sampler that can be measured.

    Example:
        >>> EffectiveTemperature(every_n_steps=100).table
        {}

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, section 4 (variance-corrected quantization).
    """

    def __init__(self, every_n_steps: int = 50, max_elements: int = 65536, verdict: bool = True) -> None:
        for name, value in {"every_n_steps": every_n_steps, "max_elements": max_elements}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"EffectiveTemperature: `{name}` must be an int >= 1, got {value!r}.")
        self.every_n_steps = every_n_steps
        self.max_elements = max_elements
        self.verdict = verdict
        #: Parameter name -> quantity -> value, of the last measured step; ``"overall"`` for all together.
        self.table: dict[str, dict[str, float]] = {}
        #: The sentence about too much noise that was warned, if any.
        self.message: str | None = None
        #: The sentence about blocks that are held below a power of two, if any.
        self.held_message: str | None = None
        self._armed: dict[int, tuple[int, dict[str, _Conditions]]] = {}
        self._measured = 0
        self._log_excess = 0.0

    # ------------------------------------------------------------------------------------------------------ the run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a trainer whose steps cannot be measured."""
        if not _samplers(trainer):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise RuntimeError(
                f"EffectiveTemperature has nothing to measure: the trainer's optimizers are {names}, and it takes "
                "SGLD, SGHMC and PreconditionedSGLD. Use Trainer(plugins=[LowPrecisionSGLD()]), or return one of them "
                "from configure_optimizers."
            )
        self._armed.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a measurement, if the step that this batch (or a later one, with accumulation) leads to is due."""
        for number, sampler in enumerate(_samplers(trainer)):
            if (sampler.steps + 1) % self.every_n_steps == 0:
                sampler.keep_gradients(self.max_elements)
            if sampler.steps % self.every_n_steps == 0:
                sampler.measure(self.max_elements)
                self._armed[number] = (sampler.steps, _conditions(sampler))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read what was measured, if the step was made."""
        layers: list[LayerNoise] = []
        for number, sampler in enumerate(_samplers(trainer)):
            armed = self._armed.get(number)
            if armed is not None and sampler.steps > armed[0]:
                del self._armed[number]
                layers += [LayerNoise(s, *armed[1][s.name]) for s in sampler.measured]
        if layers:
            self._report(trainer, pl_module, layers)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what the run amounted to."""
        if self._measured:
            ratio = math.exp(self._log_excess / self._measured)
            beside = self.table.get("overall", {}).get("minibatch_over_target")
            rank_zero_info(
                f"EffectiveTemperature: over {self._measured} measured steps the injected noise had {ratio:.3g} times "
                "the variance (temperature, for SGHMC) asked for (geometric mean)."
                + (f" Minibatch noise, beside it, had {beside:.3g} times that variance in the last." if beside else "")
            )

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: list[LayerNoise]) -> None:
        total = overall(layers)
        self.table = {"overall": total, **{layer.statistics.name: layer.quantities() for layer in layers}}
        self._say_held(layers)
        plugin: Any = trainer.precision_plugin
        if getattr(plugin, "card", None) is not None and "minibatch_over_target" in total:
            plugin.card = replace(plugin.card, minibatch=total["minibatch_over_target"])
        ratio = heating(layers)
        if ratio > 0:
            self._measured += 1
            self._log_excess += math.log(ratio)
            if self.verdict and self.message is None and ratio > _LIMIT:
                self.message = _verdict(trainer, total, layers)
                rank_zero_warn(self.message)
        if not trainer.barebones:
            log_table(trainer, pl_module, "noise", self.table)

    def _say_held(self, layers: list[LayerNoise]) -> None:
        if self.verdict and self.held_message is None:
            self.held_message = held_below(layers)
            if self.held_message is not None:
                rank_zero_warn(self.held_message)

    # -------------------------------------------------------------------------------------------------- saved state

    def state_dict(self) -> dict[str, Any]:
        """The verdicts, so that each is given once, and the sums of the final summary."""
        said = {"message": self.message, "held_message": self.held_message}
        return {**said, "measured": self._measured, "log_excess": self._log_excess}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint stopped."""
        self.message, self.held_message = state_dict["message"], state_dict.get("held_message")
        self._measured, self._log_excess = state_dict["measured"], state_dict["log_excess"]


def _samplers(trainer: pl.Trainer) -> list[GridSampler]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, GridSampler)]


def _conditions(sampler: GridSampler) -> dict[str, _Conditions]:
    """Temperature (0 if this step injects no noise), step size and format of every parameter, by name."""
    return {
        sampler.name_of(param): (
            float(group["temperature"]) if sampler.noise_variance(group) else 0.0,
            sampler.step_size(group),
            sampler.sum_format_of(param),
        )
        for group in sampler.sampled_groups
        for param in group["params"]
    }


def _verdict(trainer: pl.Trainer, total: Mapping[str, float], layers: list[LayerNoise]) -> str:
    """A sentence for people: asked, got, why, and what helps."""
    temperature = max(layer.temperature for layer in layers)
    rounding = [s for s in _samplers(trainer) if s.weight_format is not None]
    names = {f"{s.weight_format}" + (f" summed in {s.accumulator}" if s.accumulator_format else "") for s in rounding}
    text = (
        f"T = {temperature:g} with {', '.join(sorted(names))} behaves like "
        f"T ~ {total['effective_temperature']:.2g}: rounding injects {total['achieved_over_target']:.3g} times the "
        f"variance asked for{_of_what(total)}; at {100 * total['unreachable']:.0f} % of the weights it alone has more "
        "than that, so no unbiased rounding can do with less."
    )
    cases = _cases(trainer, {layer.statistics.name: layer for layer in layers})
    if not cases or len(rounding) != 1:
        return text
    wide, weights = rounding[0].accumulator_format, rounding[0].weight_format
    fmt: NumberFormat = wide or weights  # type: ignore[assignment]  # those that round have a format
    helps = remedies(cases, fmt, temperature, limit=_LIMIT, summed=wide is not None)
    return f"{text} What brings it below {_LIMIT:g} times: {', or '.join(helps)}."


def _of_what(total: Mapping[str, float]) -> str:
    if "velocity_achieved_over_target" not in total:
        return ""
    return f" into positions, {total['velocity_achieved_over_target']:.3g} times into velocities"


@torch.no_grad()
def _cases(trainer: pl.Trainer, layers: Mapping[str, LayerNoise]) -> list[Case]:
    """Tensors to try remedies on: the weights as they are now, with the gradients of the step just made."""
    cases = []
    for sampler in _samplers(trainer):
        if not isinstance(sampler, SGLD):  # of the others the noise of a weight is no function of lr and T alone
            continue
        for group in sampler.sampled_groups:
            for param in group["params"]:
                layer, mode = layers.get(sampler.name_of(param)), sampler.accumulation(param)
                grad = sampler.gradient_rows.get(param) if param.grad is None else param.grad
                if layer is None or grad is None or mode not in ("vc", "naive"):
                    continue
                q = sampler.shrinkage_of(param)
                theta = sampler.accumulator_of(param).detach()
                mean = _mean_of_step(theta, grad, layer.lr / q, float(group["weight_decay"]) * q)
                cases.append(Case(mean, param.numel(), layer.lr, sampler.num_data, mode == "vc"))
    return cases


def _mean_of_step(theta: Tensor, grad: Tensor, lr: float, weight_decay: float) -> Tensor:
    """θ - η(g + λθ) of the first rows of a parameter (or of its accumulator), on the CPU.

    The gradient is not rounded: on a coarse grid of its own it would, for round numbers of lr, land on exactly the grid
    that is being tried, and advice would not survive another lr.
    """
    theta = plain(first_rows(theta, _TRIAL_ELEMENTS)).cpu()
    grad = (grad[: len(theta)] if theta.ndim else grad).cpu()
    return descend(theta, grad.to(theta.dtype), lr=lr, weight_decay=weight_decay)
