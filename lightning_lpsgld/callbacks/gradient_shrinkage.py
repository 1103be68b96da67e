"""What rounding leaves of the gradients, and dividing by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lpsgld.analysis import Shrinkage, gradient_shrinkage, suggest_gradient_format
from lightning_lpsgld.callbacks.compensation import Compensation
from lightning_lpsgld.callbacks.tables import log_table
from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.samplers.grid import GridSampler
from lightning_lpsgld.samplers.shards import local_part

__all__ = ["GradientShrinkage"]


class _Layer(NamedTuple):
    """One parameter of a measured step; tensors stay on the device until the step is over."""

    param: Tensor
    name: str
    fmt: NumberFormat
    drawn: Shrinkage
    nearest: Shrinkage
    expected: Tensor
    alive: Tensor

    def quantities(self) -> dict[str, float]:
        """What is logged of it, in one transfer."""
        values = {
            "q": self.drawn.projection,
            "q_expected": self.expected,
            "q_nearest": self.nearest.projection,
            "norm_ratio": self.drawn.norm_ratio,
            "cosine": self.drawn.cosine,
            "noise": self.drawn.residual,
            "zeroed": self.drawn.zeroed,
            "zeroed_nearest": self.nearest.zeroed,
            "nonzero": self.alive,
        }
        return dict(zip(values, torch.stack(list(values.values())).tolist()))


class GradientShrinkage(Callback):
    r"""Measure what rounding leaves of every parameter's gradient: :math:`\tilde g = q\,g + \varepsilon`.

    On each measured step the gradient that the step is about to round (averaged over ranks, after clipping) is compared
    with what the step makes of it, by the step's own draws, and with rounding to nearest. Logged are

    * ``shrinkage/q_min`` and ``shrinkage/q_mean``: smallest and mean over the parameters of
      :math:`q = \langle\tilde g, g\rangle / \lVert g\rVert^2`, of this step's draws;
    * ``shrinkage/zeroed`` and ``shrinkage/zeroed_nearest``: share of all non-zero entries that round to zero,
      stochastically (as the step does) and to nearest;
    * ``shrinkage/predicted_slowdown``: 1 over the smallest *expected* q,
      :math:`\langle E\tilde g, g\rangle / \lVert g\rVert^2` given g: by how much more steps the slowest parameter
      needs. Stochastic rounding is unbiased within the range of its format, so this exceeds 1 by saturation only,
      however small ``q_min`` is by the chance of a draw; what such draws cost is noise;
    * per parameter (``shrinkage/<quantity>/<parameter>``, and in :attr:`table`): ``q``, ``q_expected``, ``q_nearest``,
      ``norm_ratio``, ``cosine``, ``noise`` (:math:`\lVert\varepsilon\rVert / \lVert g\rVert`), ``zeroed``,
      ``zeroed_nearest``, and ``nonzero``, the number of entries that were not zero before.

    Measuring does not change the chain. ``compensate=True`` does: every rounded gradient is divided by the running
    average of its parameter's expected q, while noise and weight decay stay as they are
    (:meth:`~lightning_lpsgld.samplers.SGLD.compensate`). For SGLD at T = 0 without weight decay that is the learning
    rate lr/q. With noise, lr/q alone would be wrong: a drift of q g with the noise of g has the temperature T/q, and
    only the drift may be changed. A step is divided by what *earlier* steps measured. Logged in addition:
    ``shrinkage/gain`` and ``shrinkage/gain/<parameter>``, 1 over the divisor.

    **Where the promise stops.** What saturation cuts off depends on the weights, so a divisor that follows it makes the
    drift :math:`q(\theta)\,g/\bar q` with :math:`\bar q` of the past: no gradient of anything, and neither is the
    drift with a fixed one. Use it in burn-in and optimisation, and fix it for sampling (``compensate_until``): the law
    is then right as far as q is constant over the posterior; better is a format without saturation. One q per tensor
    restores the length, not the direction (``cosine``). Ranks agree because they see the same averaged gradient. On a
    sharded parameter the measurement is this rank's shard, rounded by itself, and compensation is refused. With
    ``backend="qtorch"`` the draws are others of the same law. SVRG and HALP are not measured.

    Args:
        every_n_steps: Measure steps 0, n, 2n, ... of each sampler.
        threshold: Warn once, with what would help, when ``q_min`` falls below; 0 never warns.
        compensate: Divide gradients by q, from the step after the first measurement on.
        compensate_until: Step (of the sampler) from which on the divisors stay as they are; ``None``: never.
        smoothing: Weight of the past in the average of q, in [0, 1).
        q_floor: Smallest q that is believed, in (0, 1].

    Raises:
        ValueError: If ``every_n_steps`` is not an int >= 1, or another argument is out of its range.
        RuntimeError: When training starts, if no optimizer of the trainer is a sampler that rounds gradients.
        TypeError: When training starts, if shrinkage of sharded parameters is to be compensated.

    Example:
        >>> GradientShrinkage(every_n_steps=100).table
        {}
        >>> GradientShrinkage(every_n_steps=10, compensate=True, compensate_until=5000).compensation.floor
        0.1

    Reference:
        Yun, 2025, arXiv:2508.07142 (the model).
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        threshold: float = 0.5,
        *,
        compensate: bool = False,
        compensate_until: int | None = None,
        smoothing: float = 0.9,
        q_floor: float = 0.1,
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"GradientShrinkage: `every_n_steps` must be an int >= 1, got {every_n_steps!r}.")
        if not 0 <= threshold <= 1:
            raise ValueError(f"GradientShrinkage: `threshold` must be in [0, 1], got {threshold!r}.")
        self.every_n_steps = every_n_steps
        self.threshold = threshold
        settings = Compensation(compensate_until, smoothing, q_floor)
        #: How q is followed; ``None``: gradients are only measured.
        self.compensation = settings if compensate else None
        #: Parameter name -> quantity -> value, of the last measured step; ``"overall"`` for all together.
        self.table: dict[str, dict[str, float]] = {}
        #: The sentence that was warned, if any.
        self.message: str | None = None
        self._observed: list[_Layer] = []
        self._read: dict[Tensor, tuple[_Layer, dict[str, float]]] = {}
        self._detachers: list[Callable[[], None]] = []

    # ------------------------------------------------------------------------------------------------------ the run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a trainer whose steps cannot be measured; watch the others' gradients."""
        samplers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, GridSampler)]
        if not samplers:
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise RuntimeError(
                f"GradientShrinkage has nothing to measure: the trainer's optimizers are {names}, and it takes SGLD, "
                "SGHMC or PreconditionedSGLD. Use Trainer(plugins=[LowPrecisionSGLD()]), or return one of them from "
                "configure_optimizers."
            )
        if all(sampler.gradient_format is None for sampler in samplers):
            raise RuntimeError(
                "GradientShrinkage has nothing to measure: gradients are not rounded (`gradient_format` is None). Set "
                "LowPrecisionSGLD(gradients='bfp8'), or leave this callback out."
            )
        self._detach()
        for sampler in samplers:
            self._attach(sampler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report what was measured, if a step was made."""
        if not self._read:
            return
        layers = [layer for layer, _ in self._read.values()]
        rows = {layer.name: row for layer, row in self._read.values()}
        self._read = {}
        self.table = {"overall": _overall(list(rows.values())), **rows}
        if self.message is None and self.table["overall"]["q_min"] < self.threshold:
            worst = min(layers, key=lambda layer: rows[layer.name]["q"])
            self.message = _verdict(worst, rows[worst.name], self.threshold, layers)
            rank_zero_warn(self.message)
        if not trainer.barebones:
            log_table(trainer, pl_module, "shrinkage", self.table)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Watch no longer."""
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no longer."""
        self._detach()

    def _attach(self, sampler: GridSampler) -> None:
        if self.compensation is not None:
            _refuse_shards(sampler)
        observe = partial(self._observe, sampler)
        sampler.gradient_observers.append(observe)
        self._detachers.append(partial(sampler.gradient_observers.remove, observe))
        # Read within the step: whatever saves the sampler after it saves the divisor of the next step, too.
        self._detachers.append(sampler.register_step_post_hook(self._after_step).remove)

    def _detach(self) -> None:
        for detach in self._detachers:
            detach()
        self._detachers, self._observed, self._read = [], [], {}

    def _after_step(self, sampler: GridSampler, *_: Any) -> None:
        """Numbers of what was observed in the step, and the divisors of the next."""
        observed, self._observed = self._observed, []
        observed.sort(key=lambda layer: sampler.index_of(layer.param))  # a backward pass has them the other way round
        for layer in observed:
            row = layer.quantities()
            self._read[layer.param] = (layer, row)
            if self.compensation is not None:
                self.compensation.follow(sampler, layer.param, row["q_expected"])
                row["gain"] = 1.0 / sampler.shrinkage_of(layer.param)

    def _observe(self, sampler: GridSampler, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        if group["step"] % self.every_n_steps:
            return
        for param, grad in zip(params, grads):
            fmt, exact = sampler.gradient_format_of(param), local_part(grad)
            if fmt is not None and exact.numel():
                rounded = sampler.rounded_gradient(group, param, grad)
                nearest = quantize(exact, fmt, rounding="nearest")
                self._observed.append(
                    _Layer(
                        param,
                        sampler.name_of(param),
                        fmt,
                        gradient_shrinkage(rounded, exact),
                        gradient_shrinkage(nearest, exact),
                        gradient_shrinkage(_expected(exact, fmt), exact).projection,
                        (exact != 0).sum().double(),
                    )
                )

    # -------------------------------------------------------------------------------------------------- saved state

    def state_dict(self) -> dict[str, Any]:
        """The message, so that it is given once."""
        return {"message": self.message}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint stopped."""
        self.message = state_dict["message"]


def _expected(grad: Tensor, fmt: NumberFormat) -> Tensor:
    """Mean of the stochastic rounding: the gradient, held to the range of its grid (of its block's, for blocks)."""
    low, high = fmt.value_limits(grad)
    return grad.double().clamp(low, high)  # type: ignore[arg-type]  # two numbers or two tensors


def _overall(rows: list[dict[str, float]]) -> dict[str, float]:
    alive = max(sum(row["nonzero"] for row in rows), 1.0)
    slowest = min(row["q_expected"] for row in rows)
    gains = {"gain": max(row["gain"] for row in rows)} if "gain" in rows[0] else {}
    return {
        "q_min": min(row["q"] for row in rows),
        "q_mean": sum(row["q"] for row in rows) / len(rows),
        "zeroed": sum(row["zeroed"] * row["nonzero"] for row in rows) / alive,
        "zeroed_nearest": sum(row["zeroed_nearest"] * row["nonzero"] for row in rows) / alive,
        "predicted_slowdown": 1.0 / slowest if slowest > 0 else math.inf,
        **gains,
    }


def _refuse_shards(sampler: GridSampler) -> None:
    for group in sampler.sampled_groups:
        for param in group["params"]:
            if isinstance(param, DTensor):
                raise TypeError(
                    f"GradientShrinkage(compensate=True) does not take sharded parameters, and "
                    f"{sampler.name_of(param)} is one: every rank would divide its shard by another q. Use "
                    "DDPStrategy, a block format for gradients, or compensate=False."
                )


def _verdict(layer: _Layer, row: dict[str, float], threshold: float, layers: list[_Layer]) -> str:
    """Sentences for people: what was lost, why, and what helps."""
    if row["q_expected"] < threshold:
        cause = (
            f"Its entries exceed the range of the format: progress along it is {1 / row['q_expected']:.3g} times "
            "slower on average."
        )
    else:
        cause = f"Stochastic rounding is right on average, but its noise is {row['noise']:.3g} times the gradient."
    text = (
        f"Rounding to {layer.fmt} left q = {row['q']:.2g} of the gradient of {layer.name} and made "
        f"{row['zeroed']:.0%} of its entries zero (nearest rounding: q = {row['q_nearest']:.2g}, "
        f"{row['zeroed_nearest']:.0%}). {cause}"
    )
    return f"{text} {_remedy(layer.fmt, layers)}"


def _remedy(fmt: NumberFormat, layers: list[_Layer]) -> str:
    if fmt.blocks.shared:
        return "Use more bits for gradients, or smaller blocks."
    text = "Use a block format for gradients, such as 'bfp8': its scale follows them"
    # One loss scales all gradients: the largest one decides.
    grads = [local_part(layer.param.grad) for layer in layers if layer.param.grad is not None]
    loudest = max(grads, key=lambda grad: float(grad.abs().max()), default=None)
    scale = 1.0 if loudest is None else suggest_gradient_format(loudest, fmt).scale
    if scale == 1.0:
        return f"{text}; or use more bits."
    factor = f"2^{int(math.log2(scale))}"
    return (
        f"{text}; or, with SGLD, multiply the loss, the temperature and the weight decay by {factor} and divide the "
        "learning rate by it, which changes nothing but the scale at which gradients are rounded."
    )
