"""The one line: a Lightning precision plugin that makes any fit a low-precision posterior sampling run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.nn import Module
from torch.optim import Optimizer

from lightning_lpsgld.arithmetic import Arithmetic
from lightning_lpsgld.casting import ActivationCasting
from lightning_lpsgld.distributed import GradientCompression, topology_of
from lightning_lpsgld.formats import FormatLike, NumberFormat, parse_accumulator, parse_format
from lightning_lpsgld.ops.dispatch import BackendName
from lightning_lpsgld.precision.card import PosteriorCard, describe_sampler
from lightning_lpsgld.precision.changes import OnChange
from lightning_lpsgld.precision.checks import check_arguments, names_or_types, refuse_averaging, unwrapped
from lightning_lpsgld.precision.integers import IntegerForward
from lightning_lpsgld.precision.late_check import SettleBeforeSaving, settle_at_end
from lightning_lpsgld.precision.likelihood import gradient_factor, likelihood_of, scaled
from lightning_lpsgld.precision.module_part import ModulePart
from lightning_lpsgld.precision.presets import preset_options
from lightning_lpsgld.precision.prior import Prior, PriorMean
from lightning_lpsgld.precision.replicas import ReplicaGuard, ShardGathering, compressed
from lightning_lpsgld.precision.resume import Resume, run_settings
from lightning_lpsgld.precision.run import RunDescription, describe_run
from lightning_lpsgld.precision.storage import CodedStorage, Storage, accumulator_grid, check_storage
from lightning_lpsgld.precision.takeover import round_parameters, take_over
from lightning_lpsgld.precision.variance_reduction import variance_reduced_step
from lightning_lpsgld.precision.watched import WatchedModule
from lightning_lpsgld.precision.weights import load_weights, refuse_lazy
from lightning_lpsgld.samplers import SGLD, LangevinOptimizer, StepSize, VarianceReduced

__all__ = ["LowPrecisionSGLD"]


class LowPrecisionSGLD(ModulePart):
    r"""Train in 8 bits and sample the posterior: ``Trainer(plugins=[LowPrecisionSGLD()])``.

    The plugin rounds weights, gradients, activations and errors (the gradients that flow back through activations) to
    low-precision formats and swaps the optimizer's step for a Langevin step; learning rate, weight decay, parameter
    groups and LR schedulers are taken from the module's ``configure_optimizers``. The module is not changed: neither
    its class, nor its ``state_dict`` keys. The arithmetic is *simulated* in the module's dtype; samples are *stored* in
    8 bits.

    Args:
        weights: Format of the weights, e.g. ``"bfp8"``, ``"fixed8.6"``, a format object or a qtorch number; ``None``:
            not rounded.
        gradients: Format of the gradients, rounded inside the step, after clipping.
        activations: Format of the activations; where quantizers sit is set by ``sites`` and ``exclude``.
        errors: Format of the errors.
        accumulator: ``"low"``: the weights themselves stay on the grid (SGLDLP-L). ``"full"``: steps are summed in
            float32 beside the rounded weights (SGLDLP-F). A format, e.g. ``"bfp16"``: on that grid beside them.
        variance_corrected: With an accumulator on a grid, round with the variance-corrected quantizer Q^vc.
        temperature: T >= 0; the target is :math:`p(\theta \mid D)^{1/T}`. The default is the papers' 1e-3, because
            T = 1 costs a short training of a deep net several points of error; the bare :class:`SGLD` optimizer keeps
            the textbook's 1. 0 is low-precision SGD. At 1e-3 rounding alone is often warmer than that: watch
            :class:`EffectiveTemperature`.
        num_data: N, number of training examples; ``"auto"`` counts those that training sees (samplers, cut epochs).
        seed: Seed of all draws, an int in [0, 2**64). ``None``: that of ``seed_everything``, else rank zero draws one
            and broadcasts it.
        exclude: Names (patterns of ``fnmatch``) or types of submodules left in full precision: their activations, and
            their own parameters.
        sites: Names or types of the submodules whose outputs are rounded; ``None``: those that
            :mod:`lightning_lpsgld.casting` lists.
        backend: Backend of the ops.
        sampler: The optimizer class that replaces the user's, or a ``functools.partial`` of one; ``None``:
            :class:`SGLD`. Any :class:`LangevinOptimizer`, also of your own; what it must do is written there.
        schedule: Step-size schedule that multiplies the learning rate.
        cycles: Shorthand for a :class:`CyclicalStepSize` with this many cycles over the whole run, the last seventh of
            each being its sampling stage, and noise at every step. Not together with ``schedule``.
        saved_activations: ``"codes"``: what autograd keeps of rounded activations is their codes; gradients are
            bit-identical. ``"full"``: as PyTorch does.
        compute: Dtype of the forward pass: ``"32-true"`` or ``"bf16-mixed"`` (autocast).
        check_replicas: Under DDP, compare a checksum of all weights over the ranks every that many steps (and seeds and
            weights before the first), and stop a run whose replicas have forked; 0: never, settings all the same.
        on_change: What a fit does that resumes a checkpoint (``ckpt_path``) of a run with other settings, such as
            another temperature, weight decay, learning rate, seed, number of examples, schedule, format or sampler:
            ``"refuse"`` it, naming all; go on with those of the ``"checkpoint"``; or begin a ``"new"`` chain at its
            weights, whose samples get a label of their own. What an LR scheduler changes is no difference.
        arithmetic: How layers multiply in the forward pass: ``"simulated"``: floats; ``"auto"``: codes, layer by layer,
            where that is exact and faster here; ``"integer"``: codes in all but the first layer, or an error that names
            the layer. Backward is in floats. See :attr:`layer_report`.
        storage: ``"codes"``: between uses weights are codes, a byte each (with four bits half a byte), decoded where a
            layer runs, and moved in the backward pass; the chain is that of ``"float"``, bit for bit. See
            ``docs/storage.md`` for what it excludes.
        compress_gradients: Under DDP, average gradients in 8 bits, unbiased, with a quarter of the traffic; see
            :class:`~lightning_lpsgld.distributed.GradientCompression`.
        sampled: What is sampled and rounded: patterns of ``fnmatch`` for names of parameters or of the modules that
            hold them, and types of modules, e.g. ``("head.*", nn.LayerNorm, "*lora*")``. The other trainable parameters
            stay with the user's own optimizer, its state and its schedulers. ``None``: all.
        prior_mean: Where weight decay pulls to: ``"zero"``, ``"initial"``, the weights that training begins with
            (L2-SP, Bayesian fine-tuning), or the file of a checkpoint; saved with the optimizer's state.
        prior_std: Standard deviation s of the Gaussian prior of each sampled weight at T = 1, another way to say weight
            decay 1/(N s^2), instead of the optimizer's. By name: ``{"head.*": 1.0, "*": 0.1}``, the first pattern that
            matches counts; parameters that none matches keep their group's weight decay.
        cast_frozen: Also round activations and errors of submodules nothing of which is trained.
        start_from: Checkpoint whose weights training begins with: of any Lightning run, or a plain ``state_dict``. Its
            optimizer state is not used. A run that is resumed with ``fit(ckpt_path=...)`` does not read it.
        loss_scale: What the loss is to be divided by to be the mean negative log likelihood per example, e.g. the batch
            size for a sum over the batch, or 2σ² for a mean squared error with noise of variance σ². ``None``: 1, and
            if T > 0 a training step on a few examples, once as they are and once duplicated, must not find a sum.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range; the message names it, the rule and the value.

    Example:
        >>> import lightning as L
        >>> from lightning_lpsgld import LowPrecisionSGLD
        >>> trainer = L.Trainer(max_epochs=1, plugins=[LowPrecisionSGLD()], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)

    Reference:
        Zhang, Wilson & De Sa, 2022, "Low-Precision Stochastic Gradient Langevin Dynamics", arXiv:2206.09909.
    """

    precision: Any = "32-true"

    def __init__(
        self,
        weights: FormatLike | None = "bfp8",
        gradients: FormatLike | None = "bfp8",
        activations: FormatLike | None = "bfp8",
        errors: FormatLike | None = "bfp8",
        accumulator: FormatLike = "low",
        variance_corrected: bool = True,
        temperature: float = 1e-3,
        num_data: int | Literal["auto"] = "auto",
        seed: int | None = None,
        exclude: Sequence[str | type[Module]] = (),
        sites: Sequence[str | type[Module]] | None = None,
        backend: BackendName = "auto",
        sampler: Callable[..., LangevinOptimizer] | None = None,
        schedule: StepSize | None = None,
        cycles: int | None = None,
        saved_activations: Literal["full", "codes"] = "full",
        compute: Literal["32-true", "bf16-mixed"] = "32-true",
        check_replicas: int = 50,
        compress_gradients: bool = False,
        on_change: OnChange = "refuse",
        sampled: Sequence[str | type[Module]] | None = None,
        prior_mean: PriorMean = "zero",
        prior_std: float | dict[str, float] | None = None,
        cast_frozen: bool = False,
        start_from: str | os.PathLike[str] | None = None,
        loss_scale: float | None = None,
        arithmetic: Arithmetic = "simulated",
        storage: Storage = "float",
    ) -> None:
        super().__init__()
        formats = {"weights": weights, "gradients": gradients, "activations": activations, "errors": errors}
        self.formats: dict[str, NumberFormat | None] = {
            role: None if fmt is None else parse_format(fmt) for role, fmt in formats.items()
        }
        self.accumulator = parse_accumulator(accumulator, owner="LowPrecisionSGLD")
        self.variance_corrected = variance_corrected
        self.temperature = temperature
        self.num_data = num_data
        self.seed = seed
        self.exclude = names_or_types("exclude", exclude)
        self.sites = None if sites is None else names_or_types("sites", sites)
        self.backend = backend
        self.sampler = SGLD if sampler is None else sampler
        self.schedule = schedule
        self.cycles = cycles
        self.saved_activations = saved_activations
        self.compute = compute
        self.check_replicas = check_replicas
        self.compress_gradients = compress_gradients
        self.on_change: OnChange = on_change
        self.sampled = None if sampled is None else names_or_types("sampled", sampled)
        self.prior_mean = prior_mean
        self.prior_std = prior_std
        self.cast_frozen = cast_frozen
        self.start_from = start_from
        self.loss_scale = loss_scale
        self.arithmetic: Arithmetic = arithmetic
        self.storage: Storage = storage
        self.compression: GradientCompression | None = None
        check_arguments(self)
        check_storage(self)
        self.run: RunDescription | None = None
        self._guard: ReplicaGuard | None = None
        self._late_check = SettleBeforeSaving(lambda: self.samplers)
        self._gathering = ShardGathering()
        self.card: PosteriorCard | None = None
        self.samplers: list[LangevinOptimizer] = []
        self.casting: ActivationCasting | None = None
        self._resume = Resume()
        self._integers = IntegerForward(arithmetic)
        self._stored = CodedStorage(
            storage, self.formats["weights"], self.sampled, self.exclude, accumulator_grid(self)
        )
        self._run_seed: int | None = None
        self._casting_state: dict[str, Any] | None = None
        self._watched = WatchedModule()
        self._likelihood = ""

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LowPrecisionSGLD:
        """Plugin for a row of the paper's tables.

        Args:
            name: ``"<algorithm>-<format>"``: one of ``sgd-fp``, ``sgld-fp``, ``csgld-fp``, or one of ``sgdlp-f``,
                ``sgldlp-f``, ``csgldlp-f``, ``sgdlp-l``, ``naive-sgldlp-l``, ``vc-sgldlp-l``, ``vc-csgldlp-l`` followed
                by ``-fixed8`` or ``-bfp8``.
            overrides: Any other argument of the plugin.

        Raises:
            ValueError: If there is no such preset.

        Example:
            >>> from lightning_lpsgld import LowPrecisionSGLD
            >>> LowPrecisionSGLD.preset("sgldlp-f-fixed8").accumulator
            'full'
        """
        return cls(**{**preset_options(name), **overrides})

    def __str__(self) -> str:
        # Lightning's FSDP strategy refuses every foreign precision plugin with a message that ends in str(plugin).
        return (
            f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.formats.items())}). {type(self).__name__} "
            "does not run under FSDP v1; use ModelParallelStrategy (FSDP2) or DDPStrategy."
        )

    # -------------------------------------------------------------------------------------------------- the optimizers

    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[Module, list[Optimizer], list[Any]]:
        """Swap the optimizers for samplers that share their parameter groups; then log the posterior card."""
        module = unwrapped(model)
        trainer = module._trainer
        if trainer is None or trainer.state.fn != "fit":
            return model, optimizers, lr_schedulers
        refuse_lazy(module)
        self._stored.begin(module, topology_of(trainer.strategy, trainer.world_size))
        if self.start_from is not None and trainer.ckpt_path is None and trainer.global_step == 0:
            rank_zero_info(f"LowPrecisionSGLD starts from the {load_weights(module, self.start_from)}.")
        self.run = run = describe_run(trainer, module, optimizers, self, self._resolve_seed(trainer))
        settings = run_settings(run, self)
        self._guard = ReplicaGuard(self.check_replicas, run, settings)
        self._watched.restart()
        done = [sampler.steps for sampler in self.samplers] if trainer.global_step > 0 else []
        prior = Prior(self.prior_mean, self.prior_std, required=trainer.ckpt_path is None or self.on_change == "new")
        connected = take_over(optimizers, module, run, self.sampler, self._options(), prior)
        self.samplers = [optimizer for optimizer in connected if isinstance(optimizer, LangevinOptimizer)]
        refuse_averaging(trainer, self.samplers)
        self._stored.connect(module, self.samplers, run)
        for sampler, steps in zip(self.samplers, done):  # a second `fit` goes on: no draw is made twice
            for group in sampler.sampled_groups:
                group["step"] = steps
        if self.compress_gradients:
            self.compression = compressed(model, run.chain_seed, self.samplers[0])
        self._late_check.attach(module)
        share = round_parameters(self.samplers) or self._stored.saturated
        self._gathering.begin(module, self.samplers)
        watched = (trainer, module, self.samplers, run, self.loss_scale)
        self._likelihood = likelihood_of(*watched, self.casting, self._autocast)
        self._describe(run, module, share)
        self._resume.begin(self.samplers, settings, scheduled=bool(lr_schedulers))
        if trainer.ckpt_path is None:
            rank_zero_info(str(self.card))
        else:  # only what is restored says what will be sampled
            self._resume.when_restored(lambda: rank_zero_info(str(self._describe(run, module, share))))
        return model, connected, lr_schedulers

    def _describe(self, run: RunDescription, module: Module, share: float) -> PosteriorCard:
        casts = 0 if self.casting is None else len(self.casting.describe())
        facts: Any = {"saturated": share, "casts": casts, "likelihood": self._likelihood}
        facts |= {"arithmetic": self._integers.describe(), "storage": self._stored.describe(module, run)}
        self.card = describe_sampler(self.samplers[0], run, module, prior_file=Prior(self.prior_mean).file, **facts)
        return self.card

    def _options(self) -> dict[str, Any]:
        """What is asked of every sampler; the rest follows from the run."""
        return {n: getattr(self, n) for n in ("temperature", "accumulator", "variance_corrected", "backend")}

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step; for SVRG and HALP take a centre where one is due, and evaluate the closure there too."""
        if self._guard is not None and isinstance(optimizer, LangevinOptimizer):
            self._guard.before_step(optimizer)
        if isinstance(optimizer, VarianceReduced):
            after = functools.partial(self._after_closure, model, optimizer)
            value = variance_reduced_step(
                optimizer, model, closure,
                casting=self.casting, step_context=self.train_step_context, after_closure=after,
            )  # fmt: skip
        else:
            factor = gradient_factor(optimizer, model, self.loss_scale or 1.0)
            self._stored.before_step(optimizer, model, factor)
            closure = scaled(closure, optimizer, factor)
            value = super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        if self._guard is not None and isinstance(optimizer, LangevinOptimizer):
            self._guard.after_step(optimizer)
        return value

    # ---------------------------------------------------------------------------------------------------- saved state

    def state_dict(self) -> dict[str, Any]:
        """Seed and counters of the draws; the optimizer's state is saved by Lightning."""
        casting = self._casting_state if self.casting is None else self.casting.state_dict()
        card = None if self.card is None else self.card.as_dict()
        return {"seed": self._run_seed, "casting": casting, "card": card, **self._resume.saved()}

    @property
    def begins_new_chain(self) -> bool:
        """Whether the running fit began a new chain at a checkpoint's weights."""
        return self._resume.new_chain

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what a checkpoint tells that was saved before settings were."""
        self._resume.note_old(checkpoint, checkpoint.get(type(self).__qualname__))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the draws where the checkpoint stopped.

        Raises:
            ChangedSettingsError: If the checkpoint's run had other settings, and ``on_change`` does not allow for them.
        """
        self._resume.compare(state_dict, self.on_change, seed_asked=self.seed is not None)
        if state_dict["seed"] is not None and not (self._resume.new_chain and self.seed is not None):
            self._run_seed = int(state_dict["seed"])
        self._casting_state = state_dict["casting"]
        if self.casting is not None and self._casting_state is not None:
            self.casting.load_state_dict(self._casting_state)

    def teardown(self) -> None:
        """Take the quantizers out of the module again; it is the user's as before, with the last weights."""
        self._late_check.remove()
        self._resume.end()
        if self.casting is not None:
            self._casting_state = self.casting.state_dict()
            self._integers.close()
            self.casting.remove()
            self.casting = None
        super().teardown()
        settle_at_end(self.samplers)
        self._gathering.end()
