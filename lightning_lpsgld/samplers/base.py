"""What every sampler shares: closure, groups, draws, saved state, and taking over another optimizer."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lpsgld.arguments import require_flag, require_number
from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.random import DrawKey
from lightning_lpsgld.samplers.companion import Companion, sampled_among
from lightning_lpsgld.samplers.finite import FiniteCheck
from lightning_lpsgld.samplers.group_rules import (
    check_common_values,
    check_parameters,
    refuse_bad_values,
    refuse_grad_scaler,
    refuse_gradient,
)
from lightning_lpsgld.samplers.ignored import report_ignored
from lightning_lpsgld.samplers.options import accepted_options, written_out
from lightning_lpsgld.samplers.replaced_groups import adopt_groups
from lightning_lpsgld.samplers.saved_state import chain_settings, refuse_foreign_state, restore_exactly, take_steps
from lightning_lpsgld.samplers.step_size import ConstantStepSize, StepSize, checked_schedule

__all__ = ["LangevinOptimizer"]

log = logging.getLogger(__name__)

S = TypeVar("S", bound="LangevinOptimizer")


class LangevinOptimizer(Optimizer):
    """Base of the samplers: a real ``torch.optim.Optimizer`` whose randomness is a function of (seed, step).

    Every parameter group holds ``lr``, ``weight_decay``, ``temperature``, ``seed`` and ``step``; all of them, and the
    per-parameter state, are in ``state_dict``.

    **A sampler of your own** is a subclass such as the one below; ``LowPrecisionSGLD(sampler=...)`` takes it, or a
    ``functools.partial`` of it, and gives it those of :class:`~lightning_lpsgld.samplers.options.GridOptions` that its
    constructor takes (a run that asks for another is refused). What it must do stands in ``docs/samplers.md``.

    Args:
        params: Iterable of parameters, of named parameters, or of parameter groups.
        defaults: Default options of a group.
        num_data: N >= 1, number of training examples (not batches, not divided by the world size).
        schedule: Factor on ``lr`` and gate of the noise per step; constant by default.
        check_finite: Refuse a step whose loss or gradient is NaN or infinite. On an accelerator the check is read one
            step later, so that it costs no synchronization; :meth:`settle` reads it at once.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range; the message names it, the rule and the value.

    Example:
        >>> import torch
        >>> from lightning_lpsgld.random import Role, normals, stream_id
        >>> class Plain(LangevinOptimizer):
        ...     def __init__(self, params, lr, *, num_data, temperature=1.0, weight_decay=0.0, seed=0, **options):
        ...         group = {"lr": lr, "weight_decay": weight_decay, "temperature": temperature, "seed": seed}
        ...         super().__init__(params, group, num_data=num_data, **options)
        ...     def update(self, group, params, grads):
        ...         for p, g in zip(params, grads):
        ...             key = self.key(group).at(stream=stream_id(Role.WEIGHT, self.index_of(p)))
        ...             p.sub_(self.step_size(group) * (g + group["weight_decay"] * p))
        ...             p.add_(self.noise_variance(group) ** 0.5 * normals(p.shape, key))
        >>> opt = Plain(torch.nn.Linear(2, 1).parameters(), 0.1, num_data=100, check_finite=False)
    """

    #: Makes ``torch.amp.GradScaler`` hand over its scale instead of unscaling, so that :meth:`step` can refuse it.
    _step_supports_amp_scaling = True
    prior_mean: Literal["zero", "initial"] = "zero"  # where weight decay pulls to
    #: Whether parameters may be sharded (DTensor), or held as codes.
    takes_shards, takes_codes = False, False
    _around_closure: Callable[[], AbstractContextManager[None]] = nullcontext
    #: Values of a parameter group that are no settings: the seed, and what changes from step to step.
    group_counters: tuple[str, ...] = ("seed", "step")

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        num_data: int,
        schedule: StepSize | None = None,
        check_finite: bool = True,
    ) -> None:
        if isinstance(num_data, bool) or not isinstance(num_data, int) or num_data < 1:
            raise ValueError(f"`num_data` must be an int >= 1 (number of training examples), got {num_data!r}.")
        self.num_data = num_data
        self.schedule: StepSize = ConstantStepSize() if schedule is None else checked_schedule(schedule)
        self.check_finite = require_flag("check_finite", check_finite)
        self.source: Optimizer | None = None
        self.companion: Companion | None = None  # moves what is trained and not sampled; see `sample_part`
        #: Called in every step with (group, parameters, gradients), just before the update; they must change nothing.
        self.gradient_observers: list[Callable[[dict[str, Any], list[Tensor], list[Tensor]], None]] = []
        self._indices: dict[Tensor, int] = {}
        self._names: dict[Tensor, str] = {}
        self._finite = FiniteCheck()
        self.state_observers: list[Callable[[], None]] = []  # called after a state was loaded
        self._anew: bool | None = None
        super().__init__(params, {**defaults, "step": 0})
        self._groups = self.param_groups  # others hold this list, so it stays; see `adopt_groups`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = written_out(cls)  # type: ignore[attr-defined]  # what `help` and `inspect` show

    # ------------------------------------------------------------------------------------------------ construction

    @classmethod
    def from_optimizer(cls: type[S], optimizer: Optimizer, **options: Any) -> S:
        """Take over the parameters, groups, learning rates and weight decay of another optimizer.

        The ``param_groups`` list is shared, so that LR schedulers that hold ``optimizer`` keep working. What this
        sampler does not follow (momentum, betas, ...) is said once.

        Args:
            optimizer: Any ``torch.optim.Optimizer``.
            options: Keyword arguments of the sampler, ``params``, ``lr`` and ``weight_decay`` excepted.

        Returns:
            The sampler; ``sampler.source`` is ``optimizer``.

        Raises:
            TypeError: If an option asks for something that this sampler does not do.
            ValueError: If a group maximizes, or has no learning rate.
        """
        options = accepted_options(cls, options)
        for group in optimizer.param_groups:
            if group.get("maximize"):
                raise ValueError("`maximize=True` has no meaning for a posterior: return the negative as the loss.")
            if "lr" not in group:
                raise ValueError(f"{type(optimizer).__name__} has a parameter group without `lr`; a sampler needs one.")
        groups = optimizer.param_groups
        lr = require_number("lr", groups[0]["lr"])
        kept = {name: [group.get(name) for group in groups] for name in ("step", "seed", "temperature")}
        for group in groups:
            group.setdefault("weight_decay", 0.0)
            for name in kept:  # the sampler's own options win over equally named ones of the optimizer
                group.pop(name, None)
        sampler = cls(groups, lr, **options)  # type: ignore[arg-type]  # every sampler takes (params, lr, ...)
        sampler._groups = sampler.param_groups = groups
        sampler.source = optimizer
        sampler._report_ignored(optimizer)
        return sampler

    def _report_ignored(self, optimizer: Optimizer) -> None:
        report_ignored(type(self).__name__, optimizer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters get the next numbers, so that the draws of the others stay as they are.

        Where a part is sampled, those of its parameters that are not of that part go to the companion.

        Raises:
            TypeError, ValueError: If a value of the group breaks a rule of :meth:`check_group`; it is not added then.
        """
        if self.companion is not None:
            param_group, theirs = self.companion.share(param_group)
            self.param_groups.extend(theirs)
            if not param_group["params"]:
                return
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            self.check_parameters(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group["step"] = max((g.get("step", 0) for g in self.param_groups), default=0)
        for i, param in enumerate(group["params"]):
            self._indices[param] = len(self._indices)
            if names := group.get("param_names"):
                self._names[param] = names[i]

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Refuse values of a group that no step can be made with; also before every step, as others may set them.

        Raises:
            TypeError: If a value is not a number.
            ValueError: If ``lr``, ``weight_decay`` or ``temperature`` is negative, NaN or infinite, or ``seed`` or
                ``step`` no counter.
        """
        check_common_values(group)

    def check_parameters(self, group: Mapping[str, Any]) -> None:
        """Refuse those of a group that cannot be moved."""
        check_parameters(type(self).__name__, group, takes_codes=self.takes_codes)

    def _check_settings(self) -> None:
        adopt_groups(self, self._groups)
        refuse_bad_values(type(self).__name__, self.sampled_groups, self.check_group, self.step_size, self.schedule)

    @property
    def sampled_groups(self) -> list[dict[str, Any]]:
        """The groups that are sampled: all, unless a companion moves some."""
        return sampled_among(self.param_groups)

    def accompany(self, companion: Companion) -> None:
        """Step another optimizer with this one, and hold its groups and its state too."""
        self.companion, self.source = companion, companion.optimizer
        self._groups = self.param_groups = [*self.param_groups, *companion.optimizer.param_groups]
        self.state.update(companion.optimizer.state)
        companion.optimizer.state = self.state

    def name_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Learn parameter names, for messages and statistics."""
        self._names.update({param: name for name, param in named})

    def name_of(self, param: Tensor) -> str:
        """Name of a parameter, or its number among the sampler's parameters."""
        return self._names.get(param) or f"parameter {self._indices.get(param, '?')}"

    @property
    def description(self) -> str:
        """Name of the variant, for display."""
        return type(self).__name__

    @property
    def formats(self) -> dict[str, str]:
        """Role of each rounded quantity and its format, for display."""
        return {}

    def format_of(self, param: Tensor) -> NumberFormat | None:
        """Grid on which a parameter lies, ``None`` where it lies on none."""
        return None

    def round_parameters_(self) -> None:
        """Bring the parameters onto their grid before the first step; nothing to do without one."""

    @property
    def group_options(self) -> tuple[str, ...]:
        """Names of the values in a parameter group that make the chain what it is, the learning rate among them."""
        return tuple(name for name in self.defaults if name not in self.group_counters)

    def settings(self) -> dict[str, Any]:
        """What makes the chain what it is, seed and parameters excepted; see :func:`.saved_state.chain_settings`."""
        return chain_settings(self)

    # ------------------------------------------------------------------------------------------------------ stepping

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return int(self.param_groups[0]["step"])

    def key(self, group: Mapping[str, Any]) -> DrawKey:
        """Key of the draws of the current step."""
        return DrawKey(seed=group["seed"], step=group["step"])

    def index_of(self, param: Tensor) -> int:
        """Number of a parameter among the sampler's parameters, which selects its streams."""
        return self._indices.setdefault(param, len(self._indices))

    def step_size(self, group: Mapping[str, Any]) -> float:
        """Learning rate of the current step: the group's ``lr`` times the schedule's factor."""
        if self.companion is not None:
            self.companion.follow()
        return float(group["lr"]) * self.schedule.factor(group["step"])

    def noise_variance(self, group: Mapping[str, Any]) -> float:
        r"""Variance :math:`v = 2\eta T/N` of the Langevin noise of the current step; 0 where the schedule is silent."""
        if not self.schedule.noise(group["step"]):
            return 0.0
        return 2.0 * self.step_size(group) * float(group["temperature"]) / self.num_data

    @abstractmethod
    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Move ``params`` (those of ``group`` that have a gradient) by one step, in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Evaluate ``closure`` once with gradients enabled, then update every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model, runs backward and returns the loss. Without one the gradients already
                present are used.

        Returns:
            The closure's value.

        Raises:
            FloatingPointError: If the loss or a gradient is NaN or infinite; no parameter has been changed by this
                step (on an accelerator it has, and the error comes with the next step or with :meth:`settle`).
            TypeError: If a gradient is sparse, or a GradScaler drives the step.
            TypeError, ValueError: If a value of a group breaks a rule of :meth:`check_group`; nothing has changed.
        """
        refuse_grad_scaler(type(self).__name__, getattr(self, "grad_scale", None))
        self._check_settings()
        loss = None
        if closure is not None:
            with torch.enable_grad(), self._around_closure():
                loss = closure()
            self._check_settings()  # hooks of a trainer run inside the closure
        work = [(group, *self._with_gradients(group)) for group in self.sampled_groups]
        if self.check_finite:
            self._refuse_non_finite(loss, work)
        for group, params, grads in work:
            if params:
                self._step_of(group, params, grads)
        for group in self.sampled_groups:
            group["step"] += 1
        if self.companion is not None:
            self.companion.optimizer.step()
        if self.source is not None:
            self.source._opt_called = True  # type: ignore[attr-defined]  # LR schedulers look at the optimizer they hold
        return loss

    def _step_of(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update; where that fails and the gradients of this very step turn out to be NaN, that is the reason."""
        for observe in self.gradient_observers:
            observe(group, params, grads)
        try:
            self.update(group, params, grads)
        except Exception:
            self.settle()
            raise

    def _with_gradients(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        params = [p for p in group["params"] if p.grad is not None]
        for param in params:
            refuse_gradient(type(self).__name__, param, self.name_of(param), takes_shards=self.takes_shards)
        return params, [p.grad for p in params]

    def _refuse_non_finite(self, loss: Any, work: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        params, grads = [p for _, ps, _ in work for p in ps], [g for _, _, gs in work for g in gs]
        self._finite.check(loss, params, grads, self.name_of, self.steps)

    @property
    def unsettled(self) -> bool:
        """Whether the last step's finite check has not been read (on an accelerator)."""
        return self._finite.waiting

    def settle(self) -> None:
        """Read the finite check of the last step now, which on an accelerator waits for it; elsewhere nothing waits.

        ``state_dict``, samples and checkpoints of the Trainer do it; in a plain loop call it before the weights are
        used after the last step.

        Raises:
            FloatingPointError: If a step that has been made had a NaN or infinite loss or gradient. It is raised again
                at every call until a state is loaded, because the weights hold it.
        """
        self._finite.settle()

    # --------------------------------------------------------------------------------------------------- saved state

    def state_dict(self) -> dict[str, Any]:
        """Groups and state, as of any optimizer; :meth:`settle` first."""
        self.settle()
        return super().state_dict()

    def begin_anew(self, *, keep_lr: bool) -> None:
        """Let the next :meth:`load_state_dict` begin a new chain: it takes over how many steps were made, nothing else.

        The number of steps goes on, so that no draw is made twice.

        Args:
            keep_lr: Take the learning rates of the groups over, too, which a scheduler may have set.
        """
        self._anew = keep_lr

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups in place (they may be shared with another optimizer) and state bit for bit.

        Raises:
            ValueError: If the state was saved by something that is not a sampler.
        """
        refuse_foreign_state(type(self).__name__, state_dict)
        adopt_groups(self, self._groups)
        if self._anew is None:
            self._restore(state_dict)
        else:
            take_steps(self.sampled_groups, sampled_among(state_dict["param_groups"]), keep_lr=self._anew)
            self._anew = None
        self._finite.forget()
        for observe in self.state_observers:
            observe()

    def _restore(self, state_dict: dict[str, Any]) -> None:
        shared = self.param_groups
        super().load_state_dict(state_dict)
        for group, loaded in zip(shared, self.param_groups):
            group.clear()
            group.update(loaded)
        for group in sampled_among(shared):
            group["seed"] = int(group["seed"]) % 2**64  # as the draws took it before other seeds were refused
        self.param_groups = shared
        restore_exactly(self.state, shared, state_dict)
        if self.companion is not None:
            self.companion.optimizer.state = self.state
