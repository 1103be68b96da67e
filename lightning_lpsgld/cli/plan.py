"""``lpsgld plan``: what the formats would do to a configured run, before it is trained."""

from __future__ import annotations

import math
import warnings
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer

from lightning_lpsgld.analysis import plan as make_plan
from lightning_lpsgld.analysis.plan_report import LayerPlan, Plan
from lightning_lpsgld.callbacks import SampleCollector
from lightning_lpsgld.cli.built import BuiltCLI, built
from lightning_lpsgld.cli.errors import CommandError, in_one_line, one_line
from lightning_lpsgld.cli.parsing import as_json
from lightning_lpsgld.precision.num_data import count_examples

__all__ = ["EXAMPLE", "SUMMARY", "PlanCLI", "optimizer_of", "run", "step_sizes", "training_loss"]

#: The command in the list of ``lpsgld --help``.
SUMMARY = "predict what the formats will do to a run: table, verdict, what to change"
#: A call, for its help.
EXAMPLE = "lpsgld plan --config run.yaml --json"
_POINTS = 9


class PlanCLI(BuiltCLI):
    """The configuration of a run, built but not run."""

    prog, summary, example = "lpsgld plan", SUMMARY, EXAMPLE

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a plan needs beside the run's own configuration."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument("--ckpt_path", type=str, default=None, help="plan with the weights of this checkpoint")


def run(args: list[str]) -> int:
    """Print the plan of a configuration.

    Args:
        args: Arguments after ``lpsgld plan``.
    """
    cli = built(PlanCLI, args)
    with in_one_line(cli.config):
        result = _planned(cli)
    print(as_json(_as_dict(result)) if cli.config["json"] else result)
    return 0


def _planned(cli: BuiltCLI) -> Plan:
    plugin: Any = cli.trainer.precision_plugin
    if plugin.formats["weights"] is None:
        raise CommandError("lpsgld.weights: a plan needs a format of the weights, and there is none.")
    if cli.config["ckpt_path"]:
        _load(cli.model, cli.config["ckpt_path"])
    loader = cli.loader("train")
    num_data = count_examples(loader) if plugin.num_data == "auto" else plugin.num_data
    optimizer, scheduler = optimizer_of(cli.model, cli.trainer)
    steps = _steps(cli.trainer, loader)
    collectors = [c for c in cli.trainer.callbacks if isinstance(c, SampleCollector)]  # type: ignore[attr-defined]
    return make_plan(
        cli.model,
        cli.batch("train"),
        training_loss,
        lr=step_sizes(optimizer, scheduler, steps),
        num_data=num_data,
        temperature=plugin.temperature,
        weight_decay=float(optimizer.param_groups[0].get("weight_decay", 0.0)),
        weights=plugin.formats["weights"],
        gradients=plugin.formats["gradients"],
        update="vc" if plugin.variance_corrected else "naive",
        accumulator=plugin.accumulator,
        samples=sum(c.capacity or 0 for c in collectors),
    )


def _load(model: Any, path: str) -> None:
    """Weights of a Lightning checkpoint.

    Raises:
        CommandError: If there is none, or it is another module's.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except (OSError, RuntimeError, KeyError, TypeError, UnpicklingError) as error:
        raise CommandError(f"ckpt_path: {path}: {type(error).__name__}: {one_line(error)}") from error


def optimizer_of(model: Any, trainer: Any) -> tuple[Optimizer, Any]:
    """First optimizer and its scheduler; ``configure_optimizers`` may return any form, and may ask the trainer."""
    model.trainer = trainer
    try:
        configured = model.configure_optimizers()
    finally:
        model.trainer = None  # what a step logs later is then let pass
    scheduler = None
    if isinstance(configured, dict):
        configured, scheduler = configured["optimizer"], configured.get("lr_scheduler")
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], (list, tuple)):
        configured, scheduler = configured[0], configured[1]
    if isinstance(configured, (list, tuple)):
        configured = configured[0]
    if isinstance(scheduler, (list, tuple)):
        scheduler = scheduler[0] if scheduler else None
    if not isinstance(configured, Optimizer):
        raise CommandError(f"model: configure_optimizers gave {type(configured).__name__}; a plan needs an optimizer.")
    return configured, scheduler


def _steps(trainer: Any, loader: Any) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the run."""
    try:
        epoch = math.ceil(len(loader) / trainer.accumulate_grad_batches)
    except TypeError:
        epoch = max(trainer.max_steps, 1)
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 1
    total = epoch * epochs
    return epoch, min(total, trainer.max_steps) if trainer.max_steps > 0 else total


def step_sizes(optimizer: Optimizer, scheduler: Any, steps: tuple[int, int]) -> list[float]:
    """Step sizes of a run at evenly spaced points of its schedule, the first group's.

    Args:
        optimizer: The optimizer; its learning rates are used up.
        scheduler: A scheduler, Lightning's mapping with one, or ``None``.
        steps: Optimizer steps of an epoch, and of the run.

    Returns:
        One or at most nine positive step sizes, in order.
    """
    epoch, total = steps
    interval = "epoch"
    if isinstance(scheduler, dict):
        interval, scheduler = scheduler.get("interval", "epoch"), scheduler["scheduler"]
    if scheduler is None or not hasattr(scheduler, "get_last_lr") or "metrics" in scheduler.step.__code__.co_varnames:
        return [float(optimizer.param_groups[0]["lr"])]
    count = max(1, total if interval == "step" else math.ceil(total / epoch))
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is trained here, so the scheduler steps without the optimizer
        for _ in range(count):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step()
    wanted = sorted({round(i * (count - 1) / (_POINTS - 1)) for i in range(_POINTS)})
    return [rates[i] for i in wanted if rates[i] > 0]


def training_loss(module: Any, batch: Any) -> torch.Tensor:
    """Loss of a LightningModule's training step outside of a Trainer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*self.log.*")
        out = module.training_step(batch, 0)
    loss = out["loss"] if isinstance(out, dict) else out
    if not isinstance(loss, torch.Tensor):
        raise CommandError(f"model: training_step gave {type(out).__name__}; a plan needs a loss.")
    return loss


def _layer(layer: LayerPlan) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "largest": layer.largest,
        "fraction_length": layer.fraction_length,
        "clipped": layer.clipped,
        "gradient_rms": layer.gradient_rms,
        "effective_temperature": layer.effective_temperature,
        "noise_over_target": [float(budget.ratio) for budget in layer.budgets],
        "gradient_noise_over_target": list(layer.gradient_noise),
        "bytes": layer.weight_bytes + layer.accumulator_bytes,
        "remedy_bits": layer.remedy_bits,
        "verdict": layer.verdict,
    }


def _as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "weights": str(plan.weights),
        "gradients": None if plan.gradients is None else str(plan.gradients),
        "update": plan.update,
        "accumulator": str(plan.accumulator),
        "least_accumulator": None if plan.least_accumulator is None else str(plan.least_accumulator),
        "temperature": plan.temperature,
        "effective_temperature": plan.effective_temperature,
        "num_data": plan.num_data,
        "learning_rates": list(plan.learning_rates),
        "bytes": {"weights": plan.weight_bytes, "accumulators": plan.accumulator_bytes, "samples": plan.sample_bytes},
        "verdict": plan.verdict,
        "layers": [_layer(layer) for layer in plan.layers],
    }
