"""Which likelihood the loss stands for: its functions, their weights, and whether it is a mean over the batch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset

from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.precision.run import RunDescription
from lightning_lpsgld.precision.variance_reduction import silent, training_loss
from lightning_lpsgld.samplers import LangevinOptimizer, VarianceReduced
from lightning_lpsgld.samplers.passes import traceless

__all__ = ["Likelihood", "assumed_likelihood", "likelihood_of", "scaled"]

#: Examples of the batch that is evaluated, and then duplicated.
_EXAMPLES = 8
#: Relative difference of losses that counts as none: of the arithmetic of two batch sizes, also in 8 bits.
_TOLERANCE = 0.02

_NAMES: dict[Callable[..., Any], str] = {
    F.cross_entropy: "categorical (cross_entropy)",
    F.nll_loss: "categorical (nll_loss)",
    F.binary_cross_entropy: "Bernoulli (binary_cross_entropy)",
    F.binary_cross_entropy_with_logits: "Bernoulli (binary_cross_entropy_with_logits)",
    F.mse_loss: "Gaussian of variance 1/2 per element (mse_loss: halve it for variance 1)",
    F.l1_loss: "Laplace of scale 1 per element (l1_loss)",
    F.gaussian_nll_loss: "Gaussian of the module's variance (gaussian_nll_loss)",
    F.poisson_nll_loss: "Poisson (poisson_nll_loss)",
}
#: Those whose third argument is a weight.
_WEIGHTED = (F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


@dataclass(frozen=True)
class Likelihood:
    """What a training loss says about the likelihood.

    Attributes:
        functions: Torch's loss functions that were called, as likelihoods.
        reweighted: What weights the examples: class weights, label smoothing, a weighted sampler.
        growth: Loss of a duplicated batch over that of the batch; 1 for a mean, 2 for a sum, ``None`` if not known.
    """

    functions: tuple[str, ...] = ()
    reweighted: tuple[str, ...] = ()
    growth: float | None = None

    @property
    def is_sum(self) -> bool:
        """Whether the loss is a sum over the batch."""
        return self.growth is not None and abs(self.growth - 2.0) <= 2 * _TOLERANCE

    def describe(self, loss_scale: float) -> str:
        """One line of the card."""
        scale = "" if loss_scale == 1.0 else f" / {loss_scale:g}"
        kind = ", ".join(self.functions) or "the module's own"
        text = f"exp(-N loss{scale}): the loss is taken for the mean negative log likelihood per example; {kind}"
        if self.growth is None:
            text += "; not checked"
        elif not self.is_sum and abs(self.growth - 1.0) > _TOLERANCE:
            text += f"; a duplicated batch has {self.growth:.3g} times the loss, so it is no mean over examples"
        if self.reweighted:
            text += f"; reweighted likelihood: {', '.join(self.reweighted)}"
        return text


class _Watch(TorchFunctionMode):
    """Notes torch's loss functions and their weights; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: dict[str, None] = {}
        self.reweighted: dict[str, None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NAMES:
            self.functions[_NAMES[func]] = None
            third = args[2] if len(args) > 2 and func in _WEIGHTED else None
            if any(w is not None for w in (third, kwargs.get("weight"), kwargs.get("pos_weight"))):
                self.reweighted[f"class weights of {func.__name__}"] = None
            if kwargs.get("label_smoothing"):
                self.reweighted[f"label smoothing {kwargs['label_smoothing']:g}"] = None
        return func(*args, **kwargs)


def assumed_likelihood(
    trainer: pl.Trainer, module: pl.LightningModule, context: Callable[[], Any] = contextlib.nullcontext
) -> Likelihood:
    """Evaluate the training step on a few examples, once as they are and once duplicated, without a trace.

    The examples are the first of the data set, collated as its loader does; the module is in evaluation mode. Nothing
    is concluded where that cannot be done (streams, several loaders, manual optimization, compiled modules, a step that
    fails).

    Args:
        trainer: A trainer that is about to fit, whose train dataloader is set up.
        module: Its module, on its device.
        context: Makes the context in which the step is evaluated, e.g. of autocast.

    Returns:
        What was found.

    Raises:
        ValueError: If the loss is a sum over the batch.
    """
    compiled = getattr(module, "_compiler_ctx", None) or any(
        type(m).__name__ == "OptimizedModule" for m in module.modules()
    )
    items = _first_items(trainer) if module.automatic_optimization and not compiled else None
    if items is None:
        return Likelihood()
    examples, collate = items
    watch = _Watch()
    try:
        losses = [_evaluate(trainer, module, collate(chosen), context, watch) for chosen in (examples, examples * 2)]
    except Exception as error:  # the user's step, outside of the loop that it expects: no reason to stop the run
        rank_zero_warn(
            f"LowPrecisionSGLD could not evaluate training_step before training ({type(error).__name__}: {error}), so "
            "it was not checked that the loss is a mean over the batch. Pass `loss_scale=1.0` if it is."
        )
        return Likelihood()
    once, twice = losses
    growth = None if once is None or twice is None or once == 0 else twice / once
    found = Likelihood(tuple(watch.functions), tuple(watch.reweighted), growth)
    if found.is_sum:
        raise ValueError(
            "The training loss is a sum over the batch: a duplicated batch has twice the loss. The posterior is about "
            "N times the *mean* negative log likelihood, and would be too narrow by the batch size. Use "
            "reduction='mean', or say what the loss has to be divided by: LowPrecisionSGLD(loss_scale=<batch size>)."
        )
    return found


def _first_items(trainer: pl.Trainer) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    if trainer.ckpt_path is None:  # a resumed run was checked when it began, and its loader must not be set up yet
        trainer.fit_loop.setup_data()
    combined = trainer.fit_loop._combined_loader
    leaves = combined.flattened if isinstance(combined, CombinedLoader) else []
    if len(leaves) != 1 or not isinstance(leaves[0], DataLoader) or isinstance(leaves[0].dataset, IterableDataset):
        return None
    loader = leaves[0]
    if loader.batch_sampler is None or loader.collate_fn is None:
        return None
    with _generators_kept():
        try:
            count = min(_EXAMPLES, len(loader.dataset))  # type: ignore[arg-type]
            return ([loader.dataset[i] for i in range(count)], loader.collate_fn) if count else None
        except Exception:  # a data set that is not indexed by 0, 1, 2, ...
            return None


def _evaluate(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, context: Callable[[], Any], watch: _Watch
) -> float | None:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with _generators_kept(), traceless(list(module.parameters())), silent(trainer, module), torch.no_grad():
            batch = trainer.strategy.batch_to_device(batch)
            with context(), watch:
                loss = training_loss(module, batch, 0)
    finally:
        for each, training in modes:
            each.training = training
    return None if loss is None else float(loss)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Give the global generators of torch (CPU), numpy and ``random`` back."""
    states: tuple[Tensor, Any, Any] = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def gradient_factor(optimizer: Optimizer, module: pl.LightningModule, loss_scale: float) -> float:
    """What gradients of the step to come have to be multiplied by to be those of the mean loss of its batches.

    Lightning divides every loss by ``accumulate_grad_batches``, also those of a group that the end of an epoch cuts
    short, whose gradient would then be too small beside the noise of a whole step. What the user's own optimizer moves
    keeps the gradients that it has without the plugin.

    Args:
        optimizer: Whose step it is.
        module: The module in training.
        loss_scale: Loss over mean negative log likelihood.

    Returns:
        The factor; 1 for an optimizer that is no sampler.
    """
    if not isinstance(optimizer, LangevinOptimizer):
        return 1.0
    trainer = module.trainer
    every = trainer.accumulate_grad_batches if module.automatic_optimization else 1
    gathered = (trainer.fit_loop.epoch_loop.batch_idx + 1) % every
    return (every / gathered if gathered else 1.0) / loss_scale


def scaled(closure: Callable[[], Any], optimizer: Optimizer, factor: float) -> Callable[[], Any]:
    """A closure that leaves gradients of what is sampled multiplied by a factor.

    Args:
        closure: Of the Trainer.
        optimizer: Whose step it is.
        factor: See :func:`gradient_factor`.

    Returns:
        The closure itself where there is nothing to do.
    """
    if factor == 1.0 or not isinstance(optimizer, LangevinOptimizer):
        return closure
    groups = optimizer.sampled_groups

    def scaling() -> Any:
        value = closure()
        for param in (p for group in groups for p in group["params"] if p.grad is not None):
            param.grad.mul_(factor)
        return value

    return scaling


def likelihood_of(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    samplers: Sequence[LangevinOptimizer],
    run: RunDescription,
    loss_scale: float | None,
    casting: ActivationCasting | None,
    context: Callable[[], Any],
) -> str:
    """What the loss of a fit is taken for, as a line of the card.

    Args:
        trainer: The trainer.
        module: Its module.
        samplers: Its samplers; without temperature the scale of the loss is a learning rate, and is not checked.
        run: The run.
        loss_scale: The user's; ``None``: to be checked.
        casting: Its draws are given back.
        context: As of :func:`assumed_likelihood`.

    Raises:
        ValueError: If the loss is a sum over the batch; or for a ``loss_scale`` where it does not act.
    """
    centred = [type(s).__name__ for s in samplers if isinstance(s, VarianceReduced)]
    if centred and loss_scale not in (None, 1.0):
        raise ValueError(f"LowPrecisionSGLD: `loss_scale` is not for {centred[0]}. Divide the loss by it instead.")
    warm = any(float(group["temperature"]) > 0 for sampler in samplers for group in sampler.sampled_groups)
    found = Likelihood()
    if loss_scale is None and warm:
        kept = None if casting is None else casting.state_dict()
        found = assumed_likelihood(trainer, module, context)
        if casting is not None and kept is not None:
            casting.load_state_dict(kept)
    if run.weighted_data:
        found = replace(found, reweighted=(*found.reweighted, "a weighted sampler"))
    return found.describe(loss_scale or 1.0)
