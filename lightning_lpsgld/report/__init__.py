"""One self-contained HTML page about a bank of samples: what it holds, how good it is, where it is wrong."""

from lightning_lpsgld.report.evaluation import Evaluation, Mistake
from lightning_lpsgld.report.facts import Facts, gather
from lightning_lpsgld.report.page import render

__all__ = ["Evaluation", "Facts", "Mistake", "gather", "render"]
