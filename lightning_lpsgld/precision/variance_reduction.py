"""SVRG and HALP under the Trainer: the full gradient over the train dataloader, and a silent pass at the centre."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchmetrics import Metric

from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.distributed.shares import unpadded
from lightning_lpsgld.precision.progress import tracked
from lightning_lpsgld.random import derive_seed
from lightning_lpsgld.samplers import VarianceReduced

__all__ = [
    "check_variance_reduced",
    "full_data_loader",
    "full_pass",
    "silent",
    "training_loss",
    "variance_reduced_step",
]


def check_variance_reduced(sampler: VarianceReduced, module: pl.LightningModule, accumulate: int) -> None:
    """Refuse what a step at two points cannot do.

    Args:
        sampler: The sampler.
        module: The module in training.
        accumulate: Batches per step.

    Raises:
        RuntimeError: For manual optimization, gradient accumulation, a training step that fetches its own batches, or
            sharded parameters.
    """
    name = type(sampler).__name__
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise RuntimeError(
            f"{name} evaluates the training step twice on the same batch, but {type(module).__name__}.training_step"
            f"(dataloader_iter) fetches batches itself, another one at each call. Take the batch as the argument."
        )
    if not module.automatic_optimization:
        raise RuntimeError(
            f"{name} evaluates the training step twice, which only automatic optimization lets it do. Use automatic "
            f"optimization, or a plain loop with {name}.recentre(...) and {name}.step(closure)."
        )
    if accumulate != 1:
        raise RuntimeError(
            f"{name} needs the gradients of the point and of the centre on the same batch, but the Trainer accumulates "
            f"over {accumulate}. Use accumulate_grad_batches=1 and a larger batch."
        )
    if any(isinstance(p, DTensor) for group in sampler.param_groups for p in group["params"]):
        raise RuntimeError(f"{name} does not run on sharded parameters (DTensor). Use DDPStrategy.")


def variance_reduced_step(
    sampler: VarianceReduced,
    module: pl.LightningModule,
    closure: Callable[[], Any],
    *,
    casting: ActivationCasting | None,
    step_context: Callable[[], Any],
    after_closure: Callable[[], None],
) -> Any:
    """One optimizer step under the Trainer; takes a new centre first where one is due.

    Gradient clipping and ``on_before_optimizer_step`` see the *corrected* gradient.

    Args:
        sampler: The optimizer.
        module: The module in training.
        closure: Lightning's closure: zero gradients, training step, backward.
        casting: Its draws are the same at the centre and at the point.
        step_context: Makes the context in which a training step runs.
        after_closure: Hooks and clipping, run on the corrected gradient.

    Returns:
        The closure's value at the point.
    """
    trainer = module.trainer
    check_variance_reduced(sampler, module, trainer.accumulate_grad_batches)  # which a callback may have changed
    if sampler.due(first_batch=trainer.fit_loop.batch_idx == 0):
        params = [p for group in sampler.param_groups for p in group["params"] if p.requires_grad]
        seed = derive_seed(sampler.param_groups[0]["seed"], "full gradient", sampler.steps, trainer.global_rank)
        with silent(trainer, module), seeded(trainer.train_dataloader, seed % 2**63):
            sampler.recentre(partial(full_pass, trainer, module, params, step_context))

    def at_centre() -> Any:
        draws = None if casting is None else casting.state_dict()
        with silent(trainer, module):
            value = closure()
        if casting is not None and draws is not None:
            casting.load_state_dict(draws)
        return value

    return sampler.step(closure, centre_closure=at_centre, before_update=after_closure)


# --------------------------------------------------------------------------------------------------- no trace left


@contextlib.contextmanager
def silent(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Training steps inside log nothing, update no metric and call no callback; progress bars stay, as they draw.

    ``self.log`` and ``self.log_dict`` are muted; calls that go to ``self.logger.experiment`` directly are not, and
    hooks of the module itself (``on_after_backward``, ...) are called.
    """
    owner: Any = trainer
    callbacks, kept = owner.callbacks, [_metric_state(m) for m in module.modules() if isinstance(m, Metric)]
    modules = [m for m in module.modules() if isinstance(m, pl.LightningModule) and "log" not in m.__dict__]
    owner.callbacks = [c for c in callbacks if isinstance(c, ProgressBar)]
    for each in modules:
        each.__dict__["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        owner.callbacks = callbacks
        for each in modules:
            del each.__dict__["log"]
        for metric, state in kept:
            metric.__dict__.update(state)


@contextlib.contextmanager
def seeded(loader: Any, seed: int) -> Iterator[None]:
    """Order, dropout and augmentation (by torch's generators) of the full pass are a function of ``seed``.

    Lightning saves no generator, so that otherwise a resumed run would take another full gradient. Generators are given
    back: torch's here and, for accelerators, by :func:`~lightning_lpsgld.samplers.passes.traceless`.
    """
    found = (getattr(loader, "generator", None), getattr(getattr(loader, "sampler", None), "generator", None))
    own = {generator for generator in found if generator is not None}
    states = [(generator, generator.get_state()) for generator in own]
    cpu = torch.get_rng_state()
    for generator in own:
        generator.manual_seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for generator, state in states:
            generator.set_state(state)


def _metric_state(metric: Metric) -> tuple[Metric, dict[str, Any]]:
    """States of a torchmetrics metric and what goes with them; tensors are copied, because updates may be in place."""
    names = [*metric._defaults, "_update_count", "_update_called", "_computed", "_forward_cache"]
    state = {name: metric.__dict__[name] for name in names if name in metric.__dict__}
    return metric, {k: list(v) if isinstance(v, list) else _copied(v) for k, v in state.items()}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


# ------------------------------------------------------------------------------------------------ the full gradient


def full_data_loader(loader: Any) -> DataLoader:
    """Loader over this rank's share of the data that counts every example once, whatever the epoch's loader does.

    Duplicates with which a ``DistributedSampler`` evens out its ranks are left out, a last short batch is kept. It is a
    new loader, so that persistent workers of the running epoch are not disturbed. A custom batch sampler is used as it
    is.

    Args:
        loader: The train dataloader, with the sampler that Lightning put in.

    Returns:
        A ``DataLoader`` with the same data set, collation, workers and batch size.

    Raises:
        ValueError: If the data cannot be gone through a second time while an epoch runs.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"The full gradient needs one train DataLoader over a map-style data set, got {type(loader).__name__}"
            f"{' over an iterable data set' if isinstance(loader, DataLoader) else ''}. Use SGLD for streams."
        )
    options: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    if loader.batch_size is None:
        return DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, **options)
    return DataLoader(loader.dataset, loader.batch_size, sampler=_own_indices(loader.sampler), **options)


def _own_indices(sampler: Any) -> Iterable[int]:
    if not isinstance(sampler, DistributedSampler):
        return sampler  # type: ignore[no-any-return]
    return list(islice(sampler, unpadded(sampler)))


def full_pass(
    trainer: pl.Trainer, module: pl.LightningModule, params: list[Tensor], step_context: Callable[[], Any]
) -> Tensor:
    """Leave the exact mean gradient over all training data, on all ranks, in ``.grad``; returns the mean loss.

    Sums and counts are reduced over ranks, so that shares of different length weigh what they should. The module's
    ``training_step`` is called directly: no DDP communication per batch.

    Args:
        trainer: The running trainer.
        module: Its module.
        params: Parameters of the sampler.
        step_context: Context of a training step.

    Raises:
        ValueError: See :func:`full_data_loader`; or if ``training_step`` never returned a loss.
    """
    wide = [torch.promote_types(p.dtype, torch.float32) for p in params]
    if params[0].device.type == "cuda":  # dropout on the device; its generator is given back by `recentre`
        torch.cuda.manual_seed(torch.initial_seed())
    sums = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(params, wide)]
    used = torch.zeros(len(params) + 2, device=params[0].device, dtype=torch.float32)  # ..., sum of losses, count
    bar = trainer.progress_bar_callback if trainer.is_global_zero else None
    for number, batch in enumerate(tracked(bar, full_data_loader(trainer.train_dataloader), "Full gradient")):
        batch = trainer.strategy.batch_to_device(batch)
        with step_context():
            loss = training_loss(module, batch, number)
        if loss is None:
            continue
        size = extract_batch_size(batch)
        for i, grad in enumerate(torch.autograd.grad(loss, params, allow_unused=True)):
            if grad is not None:
                sums[i].add_(grad, alpha=size)
                used[i] = 1.0
        used[-2] += loss.detach() * size
        used[-1] += size
    used = trainer.strategy.reduce(used, reduce_op="sum")
    flags = used.tolist()
    if flags[-1] == 0:
        raise ValueError("The full gradient pass got no loss: the data set is empty, or training_step returned None.")
    for param, total, flag in zip(params, sums, flags):
        total = trainer.strategy.reduce(total, reduce_op="sum")
        param.grad = (total / flags[-1]).to(param.dtype) if flag else None
    return used[-2] / used[-1]


def training_loss(module: pl.LightningModule, batch: Any, number: int) -> Tensor | None:
    """The loss of ``training_step`` on a batch, called as Lightning does; ``None`` where it skips the batch."""
    # By position and under Lightning's own rule: the second argument may have any name, or be missing.
    takes_number = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    output = module.training_step(batch, number) if takes_number else module.training_step(batch)
    loss = output.get("loss") if isinstance(output, dict) else output
    assert loss is None or isinstance(loss, Tensor), type(loss)
    return loss
