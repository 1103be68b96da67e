"""What the plugin does to the module: casts and codes put in and taken out, and the contexts of its passes."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_lpsgld.casting import ActivationCasting, find_sites
from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.precision.card import PosteriorCard
from lightning_lpsgld.precision.integers import IntegerForward
from lightning_lpsgld.precision.parts import frozen_modules
from lightning_lpsgld.precision.seeds import run_seed
from lightning_lpsgld.precision.storage import CodedStorage
from lightning_lpsgld.precision.watched import WatchedModule
from lightning_lpsgld.samplers import LangevinOptimizer

__all__ = ["ModulePart"]


class ModulePart(Precision):
    """Base of the plugin; it sets these, of which the arguments are documented there."""

    formats: dict[str, NumberFormat | None]
    seed: int | None
    exclude: tuple[str | type[Module], ...]
    sites: tuple[str | type[Module], ...] | None
    backend: BackendName
    saved_activations: Any
    compute: Any
    cast_frozen: bool
    casting: ActivationCasting | None
    card: PosteriorCard | None
    samplers: Sequence[LangevinOptimizer]
    _integers: IntegerForward
    _stored: CodedStorage
    _watched: WatchedModule
    _casting_state: dict[str, Any] | None
    _run_seed: int | None

    def tensor_init_context(self) -> contextlib.AbstractContextManager[Any]:
        """With ``storage="codes"`` parameters become codes as they are made."""
        return self._stored.building()

    def convert_module(self, module: Module) -> Module:
        """Put activation and error quantizers into the module, in place, by hooks; its keys stay as they are.

        With ``storage="codes"`` parameters become codes.
        """
        self._stored.convert(module)
        self._watched = WatchedModule(module)
        if self.formats["activations"] is None and self.formats["errors"] is None:
            return module
        if self.casting is not None:
            self._integers.close()
            self.casting.remove()
            self.casting = None
        frozen = [] if self.cast_frozen else frozen_modules(module)
        if frozen and not set(find_sites(module, self.sites, self.exclude).sites).difference(frozen):
            return module
        trainer = getattr(module, "_trainer", None)
        self.casting = ActivationCasting(
            module,
            activations=self.formats["activations"],
            errors=self.formats["errors"],
            sites=self.sites,
            exclude=(*self.exclude, *frozen),
            seed=self._resolve_seed(trainer),
            rank=0 if trainer is None else trainer.global_rank,
            saved_activations=self.saved_activations,
            backend=self.backend,
        )
        self.casting.attach()
        if self._casting_state is not None:
            self.casting.load_state_dict(self._casting_state)
        self._integers.open(module)
        return module

    def _resolve_seed(self, trainer: pl.Trainer | None) -> int:
        if self._run_seed is None:
            self._run_seed = run_seed(self.seed, trainer)
        return self._run_seed

    @property
    def layer_report(self) -> dict[str, str]:
        """Layer -> ``"integer"`` if its products in the last step were, else why not.

        Empty with ``arithmetic="simulated"``.
        """
        return self._integers.report()

    @contextlib.contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Round activations (and catch functional ones) during a step; autocast where asked for."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().forward_context())
            stack.enter_context(self._autocast())
            if self.casting is not None:
                stack.enter_context(self._integers.running())
                stack.enter_context(self.casting.forward_context())
            yield

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute != "bf16-mixed":
            return contextlib.nullcontext()
        return torch.autocast(self._watched.device_type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        """As :meth:`forward_context`; also notices training that never steps the sampler."""
        self._watched.refuse_unstepped()
        with self.forward_context():
            yield
        self._watched.trained(self.samplers)
        if self.card is not None and self._integers.say():
            self.card = replace(self.card, arithmetic=self._integers.describe())

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """As Lightning's, of the gradients that there are: those of weights held as codes were clipped and are gone."""
        if any(p.grad is not None for p in self.main_params(optimizer)):
            super().clip_grad_by_value(optimizer, clip_val)

    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """As Lightning's; with ``storage="codes"`` a loss that is not finite is refused while nothing has moved.

        Raises:
            FloatingPointError: If it is not.
        """
        loss: Tensor = super().pre_backward(tensor, module)
        self._stored.check_loss(loss, self.samplers)
        return loss
