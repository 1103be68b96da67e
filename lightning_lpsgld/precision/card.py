"""The posterior card: what is sampled, at which temperature, in which bits. Logged when fitting starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops.reference import power_of_two, variance_plan
from lightning_lpsgld.ops.tops import clamps_at_top
from lightning_lpsgld.precision.run import RunDescription
from lightning_lpsgld.samplers import SGLD, LangevinOptimizer
from lightning_lpsgld.samplers.grid import GridSampler
from lightning_lpsgld.samplers.shards import local_part
from lightning_lpsgld.samplers.statistics import same_rows

__all__ = ["PosteriorCard", "describe_sampler", "stored_bits"]

#: Larger tensors are looked at in so many elements, in whole rows.
_MOST_ELEMENTS = 2**17


def stored_bits(shape: torch.Size, fmt: NumberFormat | None, dtype: torch.dtype) -> int:
    """Bits that a tensor takes when stored: codes and shared exponents, or the plain dtype."""
    if fmt is None:
        return shape.numel() * torch.finfo(dtype).bits
    return 8 * fmt.stored_bytes(shape)


@dataclass(frozen=True)
class PosteriorCard:
    r"""What a run samples from.

    Attributes:
        sampler: Class and variant.
        num_data: N, training examples.
        temperature: T; the target is :math:`p(\theta \mid D)^{1/T}`.
        lr: Learning rates of the groups, before any schedule.
        weight_decay: λ of the groups.
        prior_variance: Variance 1/(Nλ) per weight of the Gaussian prior that λ implies at T = 1; ``None`` for λ = 0.
            At temperature T the sampled posterior carries the prior's T-th power, of variance T/(Nλ).
        noise_variance: v = 2·lr·T/N of the first step, per group.
        formats: Role -> format.
        weights: Elements of all parameters.
        weight_bytes: Bytes of one stored sample's parameters.
        bits_per_weight: Their mean, shared exponents included.
        tensor_bits: Bits per weight of each parameter, by name; 16 for a 1-D parameter under "bfp8", whose elements
            have an exponent each.
        reachable_always: Share of the parameters where v > Δ²/4, so that VC reaches v whatever the gradient.
        gradient_limit: For the others: median of 2T/(NΔ), the largest gradient at which VC still reaches v from a grid
            point; ``None`` if there are none.
        saturated: Share of the parameters that lay outside the range of their format when fitting began.
        seed: Seed of the draws.
        casts: Number of activation sites.
        world_size: Replicas.
        sampled: Elements of the parameters that are sampled.
        trained: Elements of those that the user's own optimizers move.
        frozen: Elements of the others.
        prior_mean: What the prior is centred at.
        adaptive: Whether a preconditioner scales the noise of each weight, so that its reach is not known beforehand.
        data_note: How N was counted, where it is not the length of the data set.
        likelihood: Which likelihood the loss is taken for, and what reweights it.
        minibatch: Variance that minibatch noise adds to a step, over that asked for, as EffectiveTemperature last
            estimated it in the run; ``None`` before.
        arithmetic: How the products of a training step run: counted by layer when one has run, unless simulated.
        storage: What is kept as codes, and which gradients are floats at once; empty with ``storage="float"``.
    """

    sampler: str
    num_data: int
    temperature: float
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    prior_variance: float | None
    noise_variance: tuple[float, ...]
    formats: dict[str, str]
    weights: int
    weight_bytes: int
    bits_per_weight: float
    tensor_bits: dict[str, float]
    reachable_always: float | None
    gradient_limit: float | None
    saturated: float
    seed: int
    casts: int
    world_size: int
    adaptive: bool = False
    sampled: int = 0
    trained: int = 0
    frozen: int = 0
    prior_mean: str = "zero"
    data_note: str = ""
    likelihood: str = ""
    minibatch: float | None = None
    arithmetic: str = "simulated"
    storage: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return asdict(self)

    def __str__(self) -> str:
        variance = self.prior_variance
        prior = "flat (no weight decay)" if variance is None else f"N({self._centre()}, {variance:.3g}) per weight"
        rows = {
            "sampler": self.sampler,
            "target": f"p(theta | D)^(1/T), T = {self.temperature:g}, N = {self.num_data}"
            + (f" ({self.data_note})" if self.data_note else ""),
            "likelihood": self.likelihood or "exp(-N loss): the loss is taken for the mean negative log likelihood",
            "prior": prior,
            "parameters": f"{self.sampled} sampled, {self.trained} trained by the module's own optimizers, "
            f"{self.frozen} frozen",
            "lr, noise": ", ".join(f"lr {lr:g}: v = {v:.3g} a step" for lr, v in zip(self.lr, self.noise_variance)),
            "formats": ", ".join(f"{role} {fmt}" for role, fmt in self.formats.items()),
            "arithmetic": self.arithmetic,
            "storage": self.storage,
            "top of blocks": f"{', '.join(self._clamping())}: codes are clamped, which holds the largest element of a "
            "block below every power of two",
            "stored sample": f"{self.weight_bytes / 1e6:.3g} MB for {self.weights} weights, "
            f"{self.bits_per_weight:.2f} bits each" + self._range_of_bits(),
            "variance": self._variance_row(),
            "minibatch": self._minibatch_row(),
            "saturated": f"{100 * self.saturated:.2f} % of the initial weights lie outside the range of their format",
            "seed": f"{self.seed}; {self.casts} activation sites; {self.world_size} replica(s)",
        }
        if not self._clamping():
            del rows["top of blocks"]
        if not self.storage:
            del rows["storage"]
        if self.saturated == 0:
            del rows["saturated"]
        if not self.trained + self.frozen:
            del rows["parameters"]
        width = max(map(len, rows))
        return "Posterior card\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())

    def _clamping(self) -> list[str]:
        """Roles and formats whose largest elements cannot pass a power of two."""
        return [f"{role} {fmt}" for role, fmt in self.formats.items() if role != "all" and clamps_at_top(fmt)]

    def _minibatch_row(self) -> str:
        if self.minibatch is None:
            return "its noise comes on top at any precision; EffectiveTemperature estimates it in the run"
        return f"its noise adds {self.minibatch:.3g} times the variance asked for, at any precision (estimated)"

    def _centre(self) -> str:
        return {"zero": "0", "initial": "initial weights"}.get(self.prior_mean, self.prior_mean)

    def _range_of_bits(self) -> str:
        if not self.tensor_bits:
            return ""
        low, high = (pick(self.tensor_bits, key=self.tensor_bits.__getitem__) for pick in (min, max))
        bits = self.tensor_bits
        return f" ({bits[low]:.2f} in {low} to {bits[high]:.2f} in {high})" if bits[low] != bits[high] else ""

    def _variance_row(self) -> str:
        if self.adaptive:
            return "2 lr T/N times the preconditioner of each weight; its reach is not known before training"
        if self.reachable_always is None:
            return "exact: the sum is kept in full precision"
        share = 100 * self.reachable_always
        text = f"within reach of the rounding at {share:.1f} % of the weights whatever the gradient"
        if self.gradient_limit is not None:
            text += f"; at the others only while |gradient| <= {self.gradient_limit:.2g} (see EffectiveTemperature)"
        return text


def _reach(sampler: GridSampler) -> tuple[float | None, float | None]:
    """Share of weights (of this rank's shards) with v > gap**2/4, and the median gradient limit of the rest.

    Of large tensors evenly spaced rows stand for all, so that the card of a billion weights takes seconds.
    """
    always, count, limits = 0.0, 0, []
    for group in sampler.sampled_groups:
        v = sampler.noise_variance(group)
        for param in group["params"]:
            fmt = sampler.sum_format_of(param)
            count += local_part(param).numel()
            if fmt is None or sampler.accumulation(param) not in ("vc", "naive", "lattice"):
                always += local_part(param).numel()
                continue
            (theta,) = same_rows([local_part(sampler.accumulator_of(param).detach())], [fmt], _MOST_ELEMENTS)
            plan = variance_plan(theta, v, fmt)
            always += float(plan.high.double().mean() if theta.numel() else 0.0) * local_part(param).numel()
            gap = power_of_two(plan.gap_exponents).expand(plan.high.shape)[~plan.high]
            if gap.numel() and isinstance(sampler, SGLD):
                limits.append(2.0 * float(group["temperature"]) / (sampler.num_data * float(gap.median())))
    limit = float(torch.tensor(limits).median()) if limits else None
    exact = all(sampler.accumulation(p) in ("full", "float") for g in sampler.sampled_groups for p in g["params"])
    return (None, None) if exact else (always / max(count, 1), limit)


def _elements(module: Module, names: Sequence[str]) -> int:
    return sum(module.get_parameter(name).numel() for name in names)


def describe_sampler(
    sampler: LangevinOptimizer,
    run: RunDescription,
    module: Module,
    *,
    saturated: float,
    casts: int,
    likelihood: str = "",
    prior_file: str | None = None,
    arithmetic: str = "simulated",
    storage: str = "",
) -> PosteriorCard:
    """Make the card of a sampler whose parameters are already on the grid.

    Args:
        sampler: The sampler.
        run: The run; its formats of activations and errors are shown beside the sampler's own.
        module: Its parameters are counted.
        saturated: Share of initial weights outside the range of their format, counted before they were rounded.
        casts: Number of activation sites.
        likelihood: Line about the likelihood that is assumed.
        prior_file: File whose weights the prior is centred at, if it is neither zero nor the initial weights.
        arithmetic: Line about how products run.
        storage: Line about what is kept as codes.

    Returns:
        The card.
    """
    casts_in = {role: str(run.formats[role]) for role in ("activations", "errors") if run.formats[role] is not None}
    params: list[Tensor] = [p for g in sampler.sampled_groups for p in g["params"]]
    groups = sampler.sampled_groups
    reach: tuple[float | None, float | None] = (None, None)
    adaptive = False
    if isinstance(sampler, GridSampler):
        adaptive = not sampler.uniform_noise
        reach = (None, None) if adaptive else _reach(sampler)
    stored = {sampler.name_of(p): stored_bits(p.shape, sampler.format_of(p), p.dtype) for p in params}
    sizes = {sampler.name_of(p): p.numel() for p in params}
    bits = sum(stored.values())
    weights = sum(p.numel() for p in params)
    decay = tuple(float(g["weight_decay"]) for g in groups)
    largest = max(decay)
    return PosteriorCard(
        sampler=sampler.description,
        num_data=sampler.num_data,
        temperature=float(groups[0]["temperature"]),
        lr=tuple(float(g["lr"]) for g in groups),
        weight_decay=decay,
        prior_variance=1.0 / (sampler.num_data * largest) if largest > 0 else None,
        noise_variance=tuple(sampler.noise_variance(g) for g in groups),
        formats={**sampler.formats, **casts_in} or {"all": "full precision"},
        weights=weights,
        weight_bytes=bits // 8,
        bits_per_weight=bits / max(weights, 1),
        tensor_bits={name: stored[name] / max(sizes[name], 1) for name in stored},
        reachable_always=reach[0],
        gradient_limit=reach[1],
        saturated=saturated,
        seed=int(groups[0]["seed"]),
        casts=casts,
        world_size=run.topology.replicas,
        adaptive=adaptive,
        sampled=_elements(module, run.parts.sampled),
        trained=_elements(module, run.parts.trained),
        frozen=_elements(module, run.parts.frozen),
        prior_mean=sampler.prior_mean if prior_file is None else f"weights of {prior_file}",
        data_note=run.data_note if sampler.num_data == run.num_data else "of the sampler",
        likelihood=likelihood,
        arithmetic=arithmetic,
        storage=storage,
    )
