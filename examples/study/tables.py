"""Tables and the figure of the study from its stored results, and what they say of the paper's claims.

::

    python examples/study/tables.py                     # reads examples/results/study/rows.csv
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

__all__ = ["CLAIMS", "Cell", "judge", "read", "table"]

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
    ("blocks that carry better than blocks that clamp, VC", "nll", "vc-sgldlp-l/bfp8", "vc-sgldlp-l/bfp8-clamp",
     "ensemble"),
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


Key = tuple[str, float, str]


def read(path: Path, size: int) -> dict[Key, dict[str, Cell]]:
    """(method/format, temperature, of) -> score -> cell."""
    values: dict[Key, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    with path.open() as file:
        for entry in csv.DictReader(file):
            if int(entry["size"]) == size:
                key = (f"{entry['method']}/{entry['format']}", float(entry["temperature"]), entry["of"])
                for name in (*SCORES, "t_eff", "seconds", "sample_mb"):
                    values[key][name][int(entry["seed"])] = float(entry[name])
    return {key: {name: Cell(by_seed) for name, by_seed in scores.items()} for key, scores in values.items()}


def table(cells: dict[Key, dict[str, Cell]], of: str) -> str:
    """Markdown: one line a row, mean and standard error over the seeds."""
    lines = [
        "| method/format | T | seeds | error % | NLL | calibrated NLL | Brier | ECE % | ECE (paper) % | T_eff |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, temperature, kind), scores in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0])):
        if kind != of:
            continue
        shown = [_shown(scores[score], 100.0 if score in PERCENT else 1.0) for score in SCORES]
        seeds = len(scores["error"].values)
        lines.append(
            f"| {name} | {temperature:g} | {seeds} | " + " | ".join(shown) + f" | {scores['t_eff'].mean:.3g} |"
        )
    return "\n".join(lines)


def _shown(cell: Cell, scale: float) -> str:
    digits = 2 if scale == 100.0 else 4
    spread = "" if math.isnan(cell.error) else f" ± {scale * cell.error:.{digits}f}"
    return f"{scale * cell.mean:.{digits}f}{spread}"


def judge(cells: dict[Key, dict[str, Cell]], better: str, worse: str, score: str, of: str) -> str:
    """Difference of two rows over the seeds they share, paired, with a 95 % interval.

    Returns:
        ``"shown"``, ``"refuted"`` or ``"open"`` with the numbers; ``"not run"`` below two shared seeds.
    """
    rows = {name: scores for (name, t, kind), scores in cells.items() if kind == of and t in (0.0, 1e-3)}
    if better not in rows or worse not in rows:
        return "not run"
    first, second = rows[better][score].values, rows[worse][score].values
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return f"open: one seed, difference {first[seeds[0]] - second[seeds[0]]:+.4f}" if seeds else "not run"
    cell = Cell({seed: first[seed] - second[seed] for seed in seeds})
    reach = float(stats.t.ppf(0.975, len(seeds) - 1)) * cell.error
    verdict = "shown" if cell.mean + reach < 0 else "refuted" if cell.mean - reach > 0 else "open"
    return f"{verdict}: {cell.mean:+.4f} [{cell.mean - reach:+.4f}, {cell.mean + reach:+.4f}], {len(seeds)} seeds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows.csv")
    parser.add_argument("--size", type=int, default=5_000)
    args = parser.parse_args()
    cells = read(args.rows, args.size)
    for of in ("last", "ensemble"):
        print(f"\nOf the {of}:\n\n{table(cells, of)}")
    print("\n| claim | score | of | verdict (difference, 95 % interval) |\n|---|---|---|---|")
    for claim, score, better, worse, of in CLAIMS:
        print(f"| {claim} | {score} | {of} | {judge(cells, better, worse, score, of)} |")


if __name__ == "__main__":
    main()
