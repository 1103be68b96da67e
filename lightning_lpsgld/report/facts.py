"""What a report says, gathered from a bank, a module and test batches."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_lpsgld.analysis.diagnostics import chain_diagnostics
from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.predictive import Task, TaskName, chain_draws, default_logits
from lightning_lpsgld.report.evaluation import Evaluation, evaluate

__all__ = ["Facts", "gather"]


@dataclass(frozen=True)
class Facts:
    """What a report says.

    Attributes:
        card: Facts about the bank, by name.
        evaluation: What test data say.
        rates: (step, learning rate, cycle) of each sample.
        traces: Quantity -> chain -> (step, value).
        convergence: Quantity -> (R-hat, ESS); empty where it cannot be computed.
        heat: Layer -> (step, effective temperature over temperature asked for), from a run's metrics.csv.
        schedule: Learning rate over the steps of the run, by the name it was logged under, from metrics.csv.
    """

    card: dict[str, str]
    evaluation: Evaluation
    rates: list[tuple[int, float | None, int | None]] = field(default_factory=list)
    traces: dict[str, dict[int, list[tuple[float, float]]]] = field(default_factory=dict)
    convergence: dict[str, tuple[float, float]] = field(default_factory=dict)
    heat: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    schedule: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def _card(bank: SampleBank) -> dict[str, str]:
    temperatures = sorted({info.temperature for info in bank.infos if info.temperature is not None})
    assert bank.spec is not None
    formats = sorted({str(entry.format) for entry in bank.spec.entries if entry.format is not None})
    return {
        "samples": f"{len(bank)} of {len(bank.chains)} chain(s)",
        "steps": f"{min(bank.steps)} to {max(bank.steps)}",
        "temperature": ", ".join(f"{value:g}" for value in temperatures) or "not recorded",
        "formats": ", ".join(formats) or "float32",
        "size": f"{bank.nbytes} bytes, {bank.nbytes / bank.nbytes_fp32:.3f} of float32" + _base_note(bank),
        "damaged": str(len(bank.damaged)),
        "module": str(bank.fingerprint)[:16],
    }


def _base_note(bank: SampleBank) -> str:
    if bank.base is None:
        return ""
    where = "once" if bank.base.kind == "stored" else "as checksums"
    return f"; {len(bank.base.digests)} frozen tensors stand there {where}"


def _convergence(draws: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    if next(iter(draws.values())).shape[1] < 4:
        return {}
    try:
        found = chain_diagnostics(draws)
    except ImportError:
        return {}
    return {name: (float(row.rhat), float(row.ess_bulk)) for name, row in found.items()}


def _logged(path: str | os.PathLike[str] | None, prefix: str) -> dict[str, list[tuple[float, float]]]:
    """Columns of a CSVLogger's file whose names begin so, over its steps, by the rest of their names."""
    if path is None:
        return {}
    found: dict[str, list[tuple[float, float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if "step" not in (table.fieldnames or ()):
            raise ValueError(
                f"{os.fspath(path)} is no metrics.csv of a CSVLogger: its first line names no column `step`."
            )
        for row in table:
            for name, value in row.items():
                if name and name.startswith(prefix) and value:
                    found.setdefault(name.removeprefix(prefix), []).append((float(row["step"]), float(value)))
    return found


def _traces(bank: SampleBank, draws: dict[str, Tensor]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    traces: dict[str, dict[int, list[tuple[float, float]]]] = {}
    steps = {chain: [i.step for i in bank.infos if i.chain == chain] for chain in bank.chains}
    for name, values in draws.items():
        for chain, row in zip(bank.chains, values.tolist()):
            traces.setdefault(name, {})[chain] = list(zip(map(float, sorted(steps[chain])[-len(row) :]), row))
    return traces


def gather(
    bank: SampleBank,
    module: nn.Module,
    batches: Iterable[Any],
    *,
    task: TaskName | Task = "auto",
    logits: Callable[[nn.Module, Any], Any] = default_logits,
    metrics_csv: str | os.PathLike[str] | None = None,
) -> Facts:
    """Evaluate all samples of a bank, and collect what a report shows.

    Args:
        bank: The samples.
        module: Built like the one that was sampled.
        batches: Test batches with targets, not shuffled; passed over once a sample.
        task: As for :func:`.bayesian_model_average`; ``"auto"``: what the first batch looks like.
        logits: ``logits(module, batch)`` gives logits, means, or means with variances.
        metrics_csv: ``metrics.csv`` of the run's CSVLogger, for the learning rate and the effective temperature of
            each layer over time.

    Raises:
        ValueError: If the bank is empty, there is no batch, one has no targets, predictions do not fit the task, or
            ``metrics_csv`` is something else.
    """
    heat, schedule = _logged(metrics_csv, "noise/achieved_over_target/"), _logged(metrics_csv, "lr-")
    evaluation = evaluate(bank, module, batches, task, logits)
    draws = chain_draws(bank)
    return Facts(
        card={"task": evaluation.task, **_card(bank)},
        evaluation=evaluation,
        rates=[(info.step, info.lr, info.cycle) for info in bank.infos],
        traces=_traces(bank, draws),
        convergence=_convergence(draws),
        heat=heat,
        schedule=schedule,
    )
