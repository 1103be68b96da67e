"""``storage="codes"``: parameters of a module become codes, and what cannot be combined with that is refused early."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_lpsgld.casting import matching_modules
from lightning_lpsgld.distributed import Topology
from lightning_lpsgld.distributed.replicas import broadcast
from lightning_lpsgld.formats import NumberFormat, parse_accumulator
from lightning_lpsgld.ops.code_cell import CodeCell
from lightning_lpsgld.ops.coded import CodedTensor
from lightning_lpsgld.ops.coded_modules import code_parameters_, float_parameters_, parameters_made_as_codes
from lightning_lpsgld.ops.memory import return_memory
from lightning_lpsgld.precision.parts import ParameterRule, matching_parameters
from lightning_lpsgld.precision.run import RunDescription
from lightning_lpsgld.samplers import LangevinOptimizer
from lightning_lpsgld.samplers.first_rounding import round_to_nearest_
from lightning_lpsgld.samplers.in_backward import CodedSampler
from lightning_lpsgld.samplers.updates import count_saturated

__all__ = ["CodedStorage", "Storage", "accumulator_grid", "check_storage"]

#: ``"float"``: parameters are floats; ``"codes"``: they are codes, decoded where they are used.
Storage = Literal["float", "codes"]


def check_storage(plugin: Any) -> None:
    """Arguments of the plugin that do not go with ``storage="codes"``, whatever the run.

    Raises:
        ValueError: Naming the argument, the rule and the value.
    """
    if plugin.storage not in get_args(Storage):
        raise ValueError(
            f"LowPrecisionSGLD: `storage` must be one of {get_args(Storage)}, got {plugin.storage!r}. 'codes' holds "
            "weights in 8 bits between uses."
        )
    if plugin.storage == "float":
        return
    kind: Any = plugin.sampler.func if isinstance(plugin.sampler, functools.partial) else plugin.sampler
    accumulator = _option(plugin, "accumulator")
    prior_mean = _option(plugin, "prior_mean")
    problems = {
        "weights must have a format, got weights=None. Give one, such as 'bfp8'": plugin.formats["weights"] is None,
        "accumulator='full' keeps a float sum beside each weight. Use accumulator='low', or a format such as 'bfp16'": (
            accumulator == "full"
        ),
        f"prior_mean={str(prior_mean)!r} keeps a float mean beside each weight. Use prior_mean='zero'": (
            prior_mean != "zero"
        ),
        f"sampler={kind.__name__} keeps floats beside every weight. Use SGLD": not kind.takes_codes,
    }
    for problem, there in problems.items():
        if there:
            raise ValueError(f"LowPrecisionSGLD(storage='codes'): {problem}, or storage='float'.")


def _same(name: str, param: Tensor) -> str:
    return name


def _option(plugin: Any, name: str) -> Any:
    """Value of an argument that the plugin and a partial of its sampler have."""
    options = plugin.sampler.keywords if isinstance(plugin.sampler, functools.partial) else {}
    return options.get(name, getattr(plugin, name))


def accumulator_grid(plugin: Any) -> NumberFormat | None:
    """Grid of the accumulators that the plugin's samplers will keep, ``None`` if they keep none on a grid."""
    accumulator = parse_accumulator(_option(plugin, "accumulator"))
    return None if isinstance(accumulator, str) else accumulator


class CodedStorage:
    """Parameters of the module of a plugin as codes, if it asks for that.

    Args:
        storage: ``"float"`` leaves parameters as they are, and makes floats again of codes.
        fmt: Grid of the weights.
        sampled: What is sampled, as the plugin has it.
        exclude: Submodules left in full precision.
        accumulator: Grid of the accumulators, if they have one.
    """

    def __init__(
        self,
        storage: Storage,
        fmt: NumberFormat | None,
        sampled: Sequence[ParameterRule] | None,
        exclude: Sequence[ParameterRule],
        accumulator: NumberFormat | None = None,
    ) -> None:
        self.storage, self._format, self._accumulator = storage, fmt, accumulator
        self._sampled, self._exclude = sampled, exclude
        #: Share of values outside of the grid's range when they became codes.
        self.saturated = 0.0

    # ----------------------------------------------------------------------------------------------------- the module

    def building(self) -> contextlib.AbstractContextManager[None]:
        """Context in which a module is built.

        Raises:
            ValueError: If what is rounded is chosen by rules, which need the whole module.
        """
        if self.storage == "float" or self._format is None:
            return contextlib.nullcontext()
        if self._sampled is not None or self._exclude:
            raise ValueError(
                "LowPrecisionSGLD(storage='codes'): parameters become codes as they are made, before they have names "
                f"in the module, so sampled={self._sampled} and exclude={self._exclude} cannot choose among them. "
                "Build the module outside of `trainer.init_module()` and `configure_model`: it becomes codes when the "
                "fit begins."
            )
        return_memory()
        return parameters_made_as_codes(self._format, finer=self._accumulator)

    def convert(self, module: Module) -> None:
        """Make codes of what a fit will sample; make floats of codes without ``storage="codes"``.

        Raises:
            RuntimeError: If something in the trainer or the module needs all gradients at once, or floats.
        """
        trainer = getattr(module, "_trainer", None)
        if trainer is None or trainer.state.fn != "fit":
            return
        if self.storage == "float":
            float_parameters_(module)
            return
        _refuse_trainer(trainer)
        return_memory()
        assert self._format is not None
        chosen, names = self._chosen(module), {id(p): name for name, p in module.named_parameters()}
        self._round_aloud(chosen, names)
        code_parameters_(module, self._format, lambda owner, name, param: id(param) in chosen, self._accumulator)
        for cell in self._cells(module) if isinstance(trainer.strategy, DDPStrategy) else []:
            cell.follows = False

    def _chosen(self, module: Module) -> dict[int, Parameter]:
        named = dict(module.named_parameters())
        names = named if self._sampled is None else matching_parameters(module, self._sampled, "sampled")
        exempt = {
            id(p)
            for name in matching_modules(module, self._exclude)
            for p in module.get_submodule(name).parameters(recurse=False)
        }
        params = [named[name] for name in names]
        return {id(p): p for p in params if p.requires_grad and p.is_floating_point() and id(p) not in exempt}

    def _cells(self, module: Module) -> list[CodeCell]:
        """Of the weights that keep what an accumulator will begin at."""
        cells = [p.cell for p in module.parameters() if isinstance(p, CodedTensor)]
        return [cell for cell in cells if cell.finer is not None]

    def begin(self, module: Module, topology: Topology) -> None:
        """Replicas have the weights of the first, by DDP; let them have what its accumulators begin at."""
        for cell in self._cells(module):
            cell.follows = True
            assert cell.finer is not None
            if topology.replicas > 1:
                broadcast(cell.finer.stored, topology.group)

    @torch.no_grad()
    def _round_aloud(self, chosen: dict[int, Parameter], names: dict[int, str]) -> None:
        """Say what rounding to nearest will lose, as a sampler does that begins, and count what lies outside."""
        assert self._format is not None
        outside = 0
        for param in chosen.values():
            if not isinstance(param, CodedTensor):
                outside += int(count_saturated(param.detach(), self._format))
                name, twin = names[id(param)], param.detach().clone().requires_grad_()
                # A copy, as the weight keeps what an accumulator begins at.
                round_to_nearest_([twin], self._format, functools.partial(_same, name))
        self.saturated = outside / max(1, sum(param.numel() for param in chosen.values()))

    # -------------------------------------------------------------------------------------------------------- the fit

    def connect(self, module: Module, samplers: Sequence[LangevinOptimizer], run: RunDescription) -> None:
        """Tell the samplers when to move.

        Raises:
            RuntimeError: If a weight that became codes is not sampled.
        """
        if self.storage == "float":
            return
        mine = {id(p) for s in samplers for g in s.sampled_groups for p in g["params"]}
        for name, param in module.named_parameters():
            if isinstance(param, CodedTensor) and param.requires_grad and id(param) not in mine:
                raise RuntimeError(
                    f"LowPrecisionSGLD(storage='codes'): {name} became codes, as it is trainable, but no sampler moves "
                    "it. Give it to the optimizer, freeze it before the fit (`requires_grad_(False)`), or name what is "
                    "sampled: LowPrecisionSGLD(sampled=...)."
                )
        for sampler in samplers:
            if isinstance(sampler, CodedSampler):
                # DDP takes gradients after the hooks in which a weight would move, also of a single rank.
                sampler.steps_in_backward = not run.replicated

    def describe(self, module: Module, run: RunDescription) -> str:
        """Line of the posterior card: bytes of the codes, and which gradients are floats at the same time."""
        if self.storage == "float":
            return ""
        coded = [p for p in module.parameters() if isinstance(p, CodedTensor)]
        held, grid = f"{sum(p.nbytes_stored for p in coded) / 1e6:.3g} MB", self._accumulator
        if grid is not None:
            held += f" and {sum(grid.stored_bytes(p.shape) for p in coded) / 1e6:.3g} MB of sums"
        trainer: Any = getattr(module, "_trainer", None)
        if not getattr(module, "automatic_optimization", True):
            gradients = "all gradients are floats until `step()`, as optimization is manual"
        elif run.replicated:
            gradients = "all gradients are floats until the step, as DDP averages them in buckets"
        elif trainer is not None and trainer.accumulate_grad_batches > 1:
            gradients = f"all gradients are floats until the last of {trainer.accumulate_grad_batches} batches"
        else:
            gradients = "one gradient at a time is floats"
        return f"weights are codes between uses, {held}; {gradients}"

    def before_step(self, sampler: Any, module: pl.LightningModule, factor: float) -> None:
        """What is done to each gradient before its weight moves: what the loop does to those that are left to it.

        Args:
            sampler: Whose step comes.
            module: In training.
            factor: Of all gradients.
        """
        if self.storage == "float" or not isinstance(sampler, CodedSampler):
            return
        transforms: list[Callable[[Tensor], Any]] = []
        if factor != 1.0:
            transforms.append(lambda grad: grad.mul_(factor))
        limit = module.trainer.gradient_clip_val
        if limit:
            transforms.append(lambda grad: grad.clamp_(-limit, limit))
        sampler.gradient_transforms = transforms

    def check_loss(self, loss: Tensor, samplers: Sequence[LangevinOptimizer]) -> None:
        """Before a backward pass in which weights may move.

        Raises:
            FloatingPointError: If the loss is NaN or infinite.
        """
        checked = [s for s in samplers if isinstance(s, CodedSampler) and s.check_finite]
        if self.storage == "codes" and checked and loss.device.type == "cpu" and not bool(loss.isfinite().all()):
            raise FloatingPointError(
                f"The loss is {loss.detach().tolist()} at step {checked[0].steps}; no parameter was changed."
            )


#: Callbacks that average weights in place, by name: not all versions of Lightning have all.
_AVERAGING = ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")


def _refuse_trainer(trainer: pl.Trainer) -> None:
    module = trainer.lightning_module
    clipped = trainer.gradient_clip_val
    averaging = [type(c).__name__ for c in trainer.callbacks if type(c).__name__ in _AVERAGING]  # type: ignore[attr-defined]
    problems = {
        f"gradient_clip_val={clipped} with gradient_clip_algorithm='norm' needs the norm of all gradients before the "
        "first weight moves. Use gradient_clip_algorithm='value'": (
            bool(clipped) and trainer.gradient_clip_algorithm != "value"
        ),
        f"{type(module).__name__}.configure_gradient_clipping sees gradients only when they are gone. Use Trainer("
        "gradient_clip_val=..., gradient_clip_algorithm='value')": is_overridden("configure_gradient_clipping", module),
        f"{type(trainer.strategy).__name__} shards float parameters. Use one device or DDPStrategy": isinstance(
            trainer.strategy, ModelParallelStrategy
        ),
        "a compiled module has its weights traced as floats. Leave torch.compile out": (
            bool(getattr(module, "_compiler_ctx", None))
            or any(type(part).__name__ == "OptimizedModule" for part in module.modules())
        ),
        f"{', '.join(averaging)} averages weights in place, of which codes would keep little. Use SampleCollector with "
        "EnsembleEvaluation": bool(averaging),
    }
    for problem, there in problems.items():
        if there:
            raise RuntimeError(f"LowPrecisionSGLD(storage='codes'): {problem}, or storage='float'.")
    watching = [name for name in ("on_after_backward", "on_before_optimizer_step") if is_overridden(name, module)]
    if watching and module.automatic_optimization:
        rank_zero_warn(
            f"LowPrecisionSGLD(storage='codes'): {type(module).__name__}.{watching[0]} comes when gradients of weights "
            "held as codes are gone: `param.grad` is None there. Use `sampler.gradient_observers`, or storage='float'."
        )
