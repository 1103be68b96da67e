"""What a report says, gathered from a bank, a module and test batches."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lpsgld.analysis.diagnostics import chain_diagnostics
from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.metrics import ReliabilityBins, brier_score, calibration_error, categorical_nll, entropy
from lightning_lpsgld.metrics.functional import reliability_bins
from lightning_lpsgld.predictive import PosteriorEnsemble, chain_draws, default_inputs, default_targets

__all__ = ["Facts", "Mistake", "gather"]

_MISTAKES = 12


@dataclass(frozen=True)
class Mistake:
    """A wrong and confident answer.

    Attributes:
        index: Number of the test point.
        truth: Its class.
        answer: The class that was given.
        confidence: Its probability.
        image: The input where it is an image, shape ``(channels, height, width)``.
    """

    index: int
    truth: int
    answer: int
    confidence: float
    image: Tensor | None


@dataclass(frozen=True)
class Facts:
    """What a report says.

    Attributes:
        card: Facts about the bank, by name.
        scores: Score by name, of the single samples (mean) and of the ensemble.
        growth: Scores of the ensemble of the first k samples, k = 1, 2, ...
        reliability: Of the ensemble.
        rates: (step, learning rate, temperature) of each sample.
        traces: Quantity -> chain -> (step, value).
        convergence: Quantity -> (R-hat, ESS); empty where it cannot be computed.
        disagreement: Share of points on which a sample's class is not the ensemble's, per sample.
        mistakes: The most confident ones first.
        heat: Layer -> (step, effective temperature over temperature asked for), from a run's metrics.csv.
    """

    card: dict[str, str]
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    growth: list[dict[str, float]] = field(default_factory=list)
    reliability: ReliabilityBins | None = None
    rates: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    traces: dict[str, dict[int, list[tuple[float, float]]]] = field(default_factory=dict)
    convergence: dict[str, tuple[float, float]] = field(default_factory=dict)
    disagreement: list[float] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    heat: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


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


def _scored(p: Tensor, y: Tensor) -> dict[str, float]:
    return {
        "error": float((p.argmax(1) != y).double().mean()),
        "nll": float(categorical_nll(p, y)),
        "brier": float(brier_score(p, y)),
        "ece": float(calibration_error(p, y)),
    }


def _mistakes(p: Tensor, y: Tensor, x: Tensor) -> list[Mistake]:
    confidence, answer = p.max(1)
    wrong = (answer != y).nonzero().flatten()
    order = wrong[confidence[wrong].argsort(descending=True)][:_MISTAKES]
    pictures = x.ndim == 4 and x.shape[1] in (1, 3)
    return [
        Mistake(i, int(y[i]), int(answer[i]), float(confidence[i]), x[i].float() if pictures else None)
        for i in order.tolist()
    ]


def _convergence(draws: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    if next(iter(draws.values())).shape[1] < 4:
        return {}
    try:
        found = chain_diagnostics(draws)
    except ImportError:
        return {}
    return {name: (float(row.rhat), float(row.ess_bulk)) for name, row in found.items()}


def _heat(path: str | os.PathLike[str] | None) -> dict[str, list[tuple[float, float]]]:
    """Columns ``noise/achieved_over_target/layer`` of a CSVLogger's file, over its steps."""
    if path is None:
        return {}
    prefix = "noise/achieved_over_target/"
    found: dict[str, list[tuple[float, float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name and name.startswith(prefix) and value:
                    found.setdefault(name.removeprefix(prefix), []).append((float(row["step"]), float(value)))
    return found


def gather(
    bank: SampleBank,
    module: nn.Module,
    batches: Iterable[Any],
    *,
    metrics_csv: str | os.PathLike[str] | None = None,
) -> Facts:
    """Evaluate all samples of a classifier's bank, and collect what a report shows.

    Args:
        bank: The samples.
        module: Built like the one that was sampled.
        batches: Test batches with targets.
        metrics_csv: ``metrics.csv`` of the run's CSVLogger, for the effective temperature of each layer over time.

    Raises:
        ValueError: If the bank is empty or there is no batch with targets.
    """
    ensemble = PosteriorEnsemble(module, bank, task="multiclass", members="streamed")
    rows, labels, inputs = [], [], []
    for batch in batches:
        truth = default_targets(batch)
        if truth is None:
            raise ValueError("report: a batch has no targets to score with.")
        rows.append(torch.stack([out.double().softmax(1).cpu() for out in ensemble.outputs(batch)]))
        labels.append(truth.cpu())
        inputs.append(default_inputs(batch).cpu())
    if not rows:
        raise ValueError("report: got no test batch.")
    p, y, x = torch.cat(rows, 1), torch.cat(labels), torch.cat(inputs)
    growth = [_scored(p[: k + 1].mean(0), y) for k in range(len(p))]
    single, mean = [_scored(member, y) for member in p], p.mean(0)
    scores = {name: (sum(row[name] for row in single) / len(single), growth[-1][name]) for name in growth[-1]}
    own = float(entropy(p).mean())
    scores["entropy"] = (own, float(entropy(mean).mean()))
    scores["mutual information"] = (0.0, float(entropy(mean).mean()) - own)
    draws = chain_draws(bank)
    traces: dict[str, dict[int, list[tuple[float, float]]]] = {}
    steps = {chain: [i.step for i in bank.infos if i.chain == chain] for chain in bank.chains}
    for name, values in draws.items():
        for chain, row in zip(bank.chains, values.tolist()):
            traces.setdefault(name, {})[chain] = list(zip(map(float, sorted(steps[chain])[-len(row) :]), row))
    return Facts(
        card=_card(bank), scores=scores, growth=growth, reliability=reliability_bins(mean, y),
        rates=[(info.step, info.lr, info.temperature) for info in bank.infos],
        traces=traces, convergence=_convergence(draws),
        disagreement=[float((member.argmax(1) != mean.argmax(1)).double().mean()) for member in p],
        mistakes=_mistakes(mean, y, x), heat=_heat(metrics_csv),
    )  # fmt: skip
