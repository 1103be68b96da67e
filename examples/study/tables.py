"""Tables and the figure of the study from its stored results, and what they say of the paper's claims.

::

    python examples/study/tables.py      # of every study that examples/results/study/ has rows of

``rows.csv``, ``rows.json`` and, if they are there, ``deep_ensembles.csv`` and ``outliers.csv`` are read; ``tables.md``
and ``study.png`` are written. DEE is the deep ensemble equivalent: how many independently trained networks have the
same calibrated log likelihood; it is given for what a run costs, for the time of one training of float32 SGD, and for
each megabyte of stored samples (a float32 network has 0.31).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

__all__ = ["CLAIMS", "LOSSES", "NO_WORSE", "Cell", "Study", "claims", "equivalent", "judge", "read", "studies", "table"]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "study"
SCORES = ("error", "nll", "calibrated_nll", "brier", "ece", "ece_paper")
#: Scores shown in percent.
PERCENT = ("error", "ece", "ece_paper")

#: (what is claimed, score, better method and format, worse method and format, of the ensemble or the last weights).
CLAIMS = [
    ("VC better than naive, fixed point", "nll", "vc-sgldlp-l/fixed8", "naive-sgldlp-l/fixed8", "ensemble"),
    ("VC better than naive, block", "nll", "vc-sgldlp-l/bfp8", "naive-sgldlp-l/bfp8", "ensemble"),
    ("VC better than SGD-L, fixed point", "error", "vc-sgldlp-l/fixed8", "sgdlp-l/fixed8", "ensemble"),
    ("full accumulator better than VC, fixed point", "nll", "sgldlp-f/fixed8", "vc-sgldlp-l/fixed8", "ensemble"),
    ("cyclical VC better calibrated than VC, block", "ece", "vc-csgldlp-l/bfp8", "vc-sgldlp-l/bfp8", "ensemble"),
    ("SGLD better calibrated than SGD, fp32", "ece", "sgld/fp32", "sgd/fp32", "last"),
    ("cyclical better calibrated than not, fp32", "ece", "csgld/fp32", "sgld/fp32", "ensemble"),
    ("16-bit accumulator better than VC of 8 bits, block", "nll", "vc-sgldlp-16/bfp8", "vc-sgldlp-l/bfp8", "ensemble"),
    ("VC better than naive, SGHMC, block", "nll", "vc-sghmclp-l/bfp8", "naive-sghmclp-l/bfp8", "ensemble"),
    ("blocks that carry better than blocks that clamp, VC", "nll", "vc-sgldlp-l/bfp8", "vc-sgldlp-l/bfp8-clamp",
     "ensemble"),
    ("blocks that carry better than blocks that clamp, SGD-L", "nll", "sgdlp-l/bfp8", "sgdlp-l/bfp8-clamp", "last"),
]  # fmt: skip

#: (what is claimed, score, method and format, reference, how much worse it may be, of which): no worse than.
NO_WORSE = [
    ("full accumulator no worse than fp32 SGLD, block", "nll", "sgldlp-f/bfp8", "sgld/fp32", 0.01, "ensemble"),
    ("full accumulator no worse than fp32 SGLD, fixed point", "nll", "sgldlp-f/fixed8", "sgld/fp32", 0.01, "ensemble"),
    ("16-bit accumulator no worse than the full one, block", "nll", "vc-sgldlp-16/bfp8", "sgldlp-f/bfp8", 0.01,
     "ensemble"),
]  # fmt: skip

#: Losses by 8 bits that are compared: (what is claimed, score, (8 bits, fp32), (8 bits, fp32) that should lose more).
LOSSES = [
    ("SGLD loses less by 8 bits than SGD, fixed point", "nll", ("vc-sgldlp-l/fixed8", "sgld/fp32", "ensemble"),
     ("sgdlp-l/fixed8", "sgd/fp32", "last")),
    ("SGLD loses less by 8 bits than SGD, block", "nll", ("vc-sgldlp-l/bfp8", "sgld/fp32", "ensemble"),
     ("sgdlp-l/bfp8", "sgd/fp32", "last")),
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Mean, standard error and values by seed of one score of one row."""

    values: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for one seed."""
        n = len(self.values)
        if n < 2:
            return math.nan
        return math.sqrt(math.fsum((v - self.mean) ** 2 for v in self.values.values()) / (n - 1) / n)

    @property
    def reach(self) -> float:
        """Half of the mean's 95 % interval (Student); NaN for one seed."""
        return float(stats.t.ppf(0.975, len(self.values) - 1)) * self.error


Key = tuple[str, float, str]


@dataclass(frozen=True)
class Study:
    """Rows that belong into one table.

    Attributes:
        size: Number of training images.
        data: Name of the data.
    """

    size: int
    data: str = "fashion-mnist"

    @property
    def suffix(self) -> str:
        """What the names of its files end with; nothing for the small study with shifts and flips."""
        kind = self.data.removeprefix("fashion-mnist")
        return kind if self.size == 5_000 else f"{kind}-{self.size}"

    def entries(self, path: Path) -> list[dict[str, str]]:
        """Its lines of a table; none where there is no such file."""
        if not path.exists():
            return []
        with path.open() as file:
            own = {"data": self.data, "size": str(self.size)}
            return [entry for entry in csv.DictReader(file) if all(entry[k] == v for k, v in own.items())]


def studies(path: Path) -> list[Study]:
    """All that a table has rows of, the small ones first."""
    with path.open() as file:
        found = {Study(int(entry["size"]), entry["data"]) for entry in csv.DictReader(file)}
    return sorted(found, key=lambda study: (study.size, study.data))


def read(path: Path, study: Study) -> dict[Key, dict[str, Cell]]:
    """(method/format, temperature, of) -> score -> cell."""
    values: dict[Key, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for entry in study.entries(path):
        key = (f"{entry['method']}/{entry['format']}", float(entry["temperature"]), entry["of"])
        for name in (*SCORES, "t_eff", "seconds", "sample_mb"):
            values[key][name][int(entry["seed"])] = float(entry[name])
    return {key: {name: Cell(by_seed) for name, by_seed in scores.items()} for key, scores in values.items()}


def read_deep(path: Path, study: Study) -> list[dict[str, float]]:
    """Scores of deep ensembles by their size; empty if none are stored."""
    return [{k: float(v) for k, v in entry.items() if k != "data"} for entry in study.entries(path)]


def equivalent(calibrated_nll: float, table: list[dict[str, float]]) -> float:
    """How many independent networks, averaged, have a calibrated NLL; linear between sizes.

    Returns:
        Below 1 there is no answer: 0. ``inf`` where the largest ensemble of the table is not enough.
    """
    sizes = [entry["members"] for entry in table]
    values = list(np.minimum.accumulate([entry["calibrated_nll"] for entry in table]))
    if calibrated_nll > values[0]:
        return 0.0
    if calibrated_nll < values[-1]:
        return float("inf")
    return float(np.interp(-calibrated_nll, [-v for v in values], sizes))


def relative_times(path: Path, study: Study) -> dict[tuple[str, float], float]:
    """(method/format, temperature) -> seconds over those of float32 SGD, where both ran on the same kind of machine.

    Args:
        path: ``rows.csv``; ``rows.json`` beside it tells the machines, and with ``busy`` that others used one: what ran
            there has no time.
        study: Of which rows.
    """
    machines = {
        run: tuple(entry.get(name, "") for name in ("cpu", "gpu", "threads"))
        for entry in json.loads(path.with_suffix(".json").read_text())
        for run in (() if entry.get("busy") else entry["runs"])
    }
    seconds: dict[tuple[str, ...], dict[tuple[str, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in study.entries(path):
        if entry["of"] == "ensemble":
            temperature = float(entry["temperature"])
            run = "-".join(entry[name] for name in ("data", "size", "method", "format"))
            machine = machines.get(f"{run}-T{temperature:g}-s{entry['seed']}")
            if machine is None:
                continue
            seconds[machine][f"{entry['method']}/{entry['format']}", temperature].append(float(entry["seconds"]))
    ratios: dict[tuple[str, float], list[float]] = defaultdict(list)
    for here in seconds.values():
        reference = here.get(("sgd/fp32", 0.0), [])
        for key, values in here.items() if reference else ():
            ratios[key] += [value / float(np.median(reference)) for value in values]
    return {key: float(np.median(values)) for key, values in ratios.items()}


def table(
    cells: dict[Key, dict[str, Cell]],
    of: str,
    deep: list[dict[str, float]],
    times: dict[tuple[str, float], float] | None = None,
) -> str:
    """Markdown: one line a row, mean and standard error over the seeds.

    Args:
        cells: Of :func:`read`.
        of: ``"last"`` or ``"ensemble"``.
        deep: Of :func:`read_deep`.
        times: Of :func:`relative_times`.
    """
    names = "method/format | T | seeds | error % | NLL | calibrated NLL | Brier | ECE % | ECE (paper) % | T_eff | MB"
    names += " | time | DEE | DEE per time | DEE per MB"
    lines = [f"| {names} |", "|---" * 15 + "|"]
    for (name, temperature, kind), scores in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0])):
        if kind != of:
            continue
        shown = [_shown(scores[score], 100.0 if score in PERCENT else 1.0) for score in SCORES]
        measured = [f"{scores[score].mean:.3g}" for score in ("t_eff", "sample_mb")]
        worth = _worth(scores, deep, (times or {}).get((name, temperature)))
        seeds = str(len(scores["error"].values))
        lines.append("| " + " | ".join([name, f"{temperature:g}", seeds, *shown, *measured, *worth]) + " |")
    return "\n".join(lines)


def _worth(scores: dict[str, Cell], deep: list[dict[str, float]], time: float | None) -> list[str]:
    """Time, and the deep ensemble equivalent alone, by time and by megabyte; empty where it is not known."""
    networks = equivalent(scores["calibrated_nll"].mean, deep) if deep else math.nan
    by = (1.0, time or math.nan, scores["sample_mb"].mean or math.nan)
    worth = [networks / amount for amount in by]
    return [_or_empty(time or math.nan, 2), *(_or_empty(value, 1) for value in worth)]


def _or_empty(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def outlier_table(path: Path, study: Study) -> str:
    """Markdown: mean over seeds of what ``outliers.py`` found, a line for each method, images and score.

    Args:
        path: ``outliers.csv``.
        study: Of which rows.

    Returns:
        Nothing where none are stored.
    """
    found: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for entry in study.entries(path):
        name = f"{entry['method']}/{entry['format']}"
        found[name, entry["temperature"], entry["of"], entry["images"], entry["score"]].append(entry)
    if not found:
        return ""
    lines = ["| method/format | T | of | images | score | seeds | AUROC | FPR95 % | AURC % |", "|---" * 9 + "|"]
    for key, entries in sorted(found.items(), key=lambda item: (item[0][3], item[0][4], item[0][0], item[0][1])):
        cells = [Cell({int(e["seed"]): float(e[name]) for e in entries}) for name in ("auroc", "fpr95", "aurc")]
        shown = [
            "" if math.isnan(cell.mean) else f"{scale * cell.mean:.{digits}f}"
            for cell, scale, digits in zip(cells, (1.0, 100.0, 100.0), (3, 1, 2))
        ]
        lines.append("| " + " | ".join([*key, str(len(entries)), *shown]) + " |")
    return "\n".join(lines)


def deep_table(deep: list[dict[str, float]]) -> str:
    """Markdown: deep ensembles by their size."""
    lines = ["| networks | error % | NLL | calibrated NLL | Brier | ECE % |", "|---|---|---|---|---|---|"]
    for entry in deep:
        shown = [f"{100 * entry['error']:.2f}", *(f"{entry[s]:.4f}" for s in ("nll", "calibrated_nll", "brier"))]
        lines.append(f"| {entry['members']:.0f} | " + " | ".join(shown) + f" | {100 * entry['ece']:.2f} |")
    return "\n".join(lines)


def _shown(cell: Cell, scale: float) -> str:
    digits = 2 if scale == 100.0 else 4
    spread = "" if math.isnan(cell.error) else f" ± {scale * cell.error:.{digits}f}"
    return f"{scale * cell.mean:.{digits}f}{spread}"


def _row(cells: dict[Key, dict[str, Cell]], name: str, of: str) -> dict[str, Cell]:
    """A row at the paper's temperature (or of SGD); empty if it was not run."""
    return next((scores for (n, t, kind), scores in cells.items() if (n, kind) == (name, of) and t in (0.0, 1e-3)), {})


def _differences(first: Cell | None, second: Cell | None) -> Cell:
    """Of the seeds that both have."""
    if first is None or second is None:
        return Cell({})
    return Cell({s: v - second.values[s] for s, v in first.values.items() if s in second.values})


def _judged(cell: Cell, margin: float = 0.0) -> str:
    """Whether a mean is below a margin, at 95 %."""
    n = len(cell.values)
    if n < 2:
        return f"open: one seed, difference {cell.mean:+.4f}" if n else "not run"
    reach = cell.reach
    verdict = "shown" if cell.mean + reach < margin else "refuted" if cell.mean - reach > margin else "open"
    return f"{verdict}: {cell.mean:+.4f} [{cell.mean - reach:+.4f}, {cell.mean + reach:+.4f}], {n} seeds"


def judge(cells: dict[Key, dict[str, Cell]], better: str, worse: str, score: str, of: str, margin: float = 0.0) -> str:
    """Difference of two rows over the seeds they share, paired, with a 95 % interval.

    Args:
        cells: Of :func:`read`.
        better: Row that is claimed to have the smaller score.
        worse: The other.
        score: Which.
        of: ``"last"`` or ``"ensemble"``.
        margin: The claim is that the difference is below it; above 0: no worse by more than that.

    Returns:
        ``"shown"``, ``"refuted"`` or ``"open"`` with the numbers; ``"not run"`` without a shared seed.
    """
    first, second = _row(cells, better, of), _row(cells, worse, of)
    return _judged(_differences(first.get(score), second.get(score)), margin)


def claims(cells: dict[Key, dict[str, Cell]]) -> str:
    """Markdown: every claim and what the rows say of it."""
    lines = ["| claim | score | of | verdict (difference, 95 % interval) |", "|---|---|---|---|"]
    for claim, score, better, worse, of in CLAIMS:
        lines.append(f"| {claim} | {score} | {of} | {judge(cells, better, worse, score, of)} |")
    for claim, score, name, reference, margin, of in NO_WORSE:
        verdict = judge(cells, name, reference, score, of, margin)
        lines.append(f"| {claim} (by more than {margin:g}) | {score} | {of} | {verdict} |")
    for claim, score, less, more in LOSSES:
        lost = [_differences(*(_row(cells, n, of).get(score) for n in (a, b))) for a, b, of in (less, more)]
        lines.append(f"| {claim} | {score} | both | {_judged(_differences(*lost))} |")
    return "\n".join(lines)


def figure(cells: dict[Key, dict[str, Cell]], deep: list[dict[str, float]], path: Path) -> None:
    """NLL of the last weights and of the ensemble at T = 1e-3, and of deep ensembles as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({n for n, t, of in cells if t in (0.0, 1e-3) and of == "ensemble"})
    fig, axes = plt.subplots(1, 2, figsize=(11, 0.32 * len(names) + 1.2), sharey=True, layout="constrained")
    for ax, (score, label, scale) in zip(axes, (("nll", "NLL", 1.0), ("ece", "ECE, %", 100.0))):
        for of, color in (("last", "0.6"), ("ensemble", "C0")):
            found = [_row(cells, name, of)[score] for name in names]
            errors = [0.0 if math.isnan(c.error) else scale * c.error for c in found]
            ax.errorbar([scale * c.mean for c in found], range(len(names)), xerr=errors, fmt="o", color=color, label=of)
        for entry in deep:
            if entry["members"] in (1, 4, 8) and score == "nll":
                ax.axvline(entry[score], color="C3", alpha=0.4, linewidth=1)
                ax.annotate(f"{entry['members']:.0f} SGD", (entry[score], len(names) - 0.4), color="C3", fontsize=7)
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[1].legend()
    fig.savefig(path, dpi=110)


def page(results: Path, study: Study) -> str:
    """Markdown of a study: its tables and what they say of the claims; its figure is drawn."""
    cells, deep = read(results / "rows.csv", study), read_deep(results / "deep_ensembles.csv", study)
    times = relative_times(results / "rows.csv", study)
    kinds = {"last": "last weights", "ensemble": "ensemble"}
    parts = [f"Of the {words}:\n\n{table(cells, of, deep, times)}" for of, words in kinds.items()]
    outliers = outlier_table(results / "outliers.csv", study)
    if outliers:
        parts.append(f"Foreign images and selective prediction:\n\n{outliers}")
    if deep:
        parts.append(f"Deep ensembles of float32 SGD:\n\n{deep_table(deep)}")
    figure(cells, deep, results / f"study{study.suffix}.png")
    return "\n\n".join([*parts, claims(cells)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for study in studies(args.results / "rows.csv"):
        text = page(args.results, study)
        (args.results / f"tables{study.suffix}.md").write_text(text)
        print(f"{study.data}, {study.size:,} training images\n\n{text}")


if __name__ == "__main__":
    main()
