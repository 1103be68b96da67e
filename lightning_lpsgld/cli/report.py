"""``lpsgld report``: one HTML page about a bank of samples."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from lightning_lpsgld.cli.built import BuiltCLI, built, ensemble_bank
from lightning_lpsgld.cli.errors import CommandError, in_one_line
from lightning_lpsgld.cli.outputs import checked_file
from lightning_lpsgld.cli.trainer import EnsembleOptions
from lightning_lpsgld.predictive import Regression, Task, TaskName
from lightning_lpsgld.report import gather, render

__all__ = ["EXAMPLE", "SUMMARY", "ReportCLI", "run"]

#: The command in the list of ``lpsgld --help``.
SUMMARY = "write one HTML page about the samples of a bank: scores, figures, traces, mistakes"
#: A call, for its help.
EXAMPLE = "lpsgld report --config run.yaml --ensemble.bank bank --ensemble.output report.html"


class ReportCLI(BuiltCLI):
    """What ``lpsgld report`` parses."""

    prog, summary, example = "lpsgld report", SUMMARY, EXAMPLE

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where the data come from."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--inputs", type=str, default="test", help="score on: val or test data")
        parser.add_argument("--metrics", type=str, default=None, help="metrics.csv of the run's CSVLogger")


def _task(options: EnsembleOptions) -> TaskName | Task:
    """The task, with its noise where that is said."""
    if options.noise_std is None:
        return options.task
    if options.task != "regression":
        raise CommandError("ensemble.noise_std: is for ensemble.task=regression.")
    return Regression(noise_variance=options.noise_std**2)


def run(args: list[str]) -> int:
    """Write the page.

    Args:
        args: Arguments after ``lpsgld report``.
    """
    cli = built(ReportCLI, args)
    options = cli.ensemble_options
    bank = ensemble_bank(options, EXAMPLE)
    if options.output is not None and not options.output.endswith(".html"):
        raise CommandError(f"ensemble.output: must end in .html, got {options.output!r}.")
    output = checked_file("report.html" if options.output is None else options.output, "ensemble.output")
    if cli.config["inputs"] not in ("val", "test"):
        raise CommandError(f"inputs: must be val or test, got {cli.config['inputs']!r}.")
    metrics = cli.config["metrics"]
    if metrics is not None and not Path(metrics).is_file():
        raise CommandError(f"metrics: {metrics} is no file; name the metrics.csv that the run's CSVLogger wrote.")
    with in_one_line(cli.config):
        batches = cli.loader(cli.config["inputs"])
        facts = gather(bank, cli.model, batches, task=_task(options), metrics_csv=metrics)
        output.write_text(render(facts, f"Samples at {options.bank}"), encoding="utf-8")
    print(output)
    return 0
