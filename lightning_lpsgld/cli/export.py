"""``lpsgld export``: the ensemble of a bank as an ONNX file or a torch.export program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_lpsgld.cli.built import BuiltCLI, built, ensemble_bank
from lightning_lpsgld.cli.errors import CommandError, in_one_line
from lightning_lpsgld.cli.outputs import checked_file
from lightning_lpsgld.export import export_onnx, export_program

__all__ = ["EXAMPLE", "SUMMARY", "ExportCLI", "run"]

#: The command in the list of ``lpsgld --help``.
SUMMARY = "write the ensemble of a bank as ONNX (.onnx) or as a torch.export program (.pt2), and check it"
#: A call, for its help.
EXAMPLE = "lpsgld export --config run.yaml --ensemble.bank bank --ensemble.output posterior.onnx"


class ExportCLI(BuiltCLI):
    """What ``lpsgld export`` parses."""

    prog, summary, example = "lpsgld export", SUMMARY, EXAMPLE

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where the inputs for the check come from."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--inputs", type=str, default="test", help="check on a batch of: train, val or test")
        parser.add_argument("--max_length", type=int, default=None, help="take sequences of up to this length")


def run(args: list[str]) -> int:
    """Export and print what came out.

    Args:
        args: Arguments after ``lpsgld export``.
    """
    cli = built(ExportCLI, args)
    options = cli.ensemble_options
    bank = ensemble_bank(options, EXAMPLE)
    if options.output is None:
        raise CommandError(f"ensemble.output: is needed, e.g. `{EXAMPLE}`.")
    suffix = Path(options.output).suffix
    if suffix not in (".onnx", ".pt2"):
        raise CommandError(f"ensemble.output: must end in .onnx or .pt2, got {options.output!r}.")
    if cli.config["inputs"] not in ("train", "val", "test"):
        raise CommandError(f"inputs: must be train, val or test, got {cli.config['inputs']!r}.")
    output = checked_file(options.output, "ensemble.output")
    write = export_onnx if suffix == ".onnx" else export_program
    with in_one_line(cli.config):
        batch = cli.batch(cli.config["inputs"])
        known: dict[str, Any] = {"task": options.task, "noise_std": options.noise_std}
        known["max_length"] = cli.config["max_length"]
        print(write(cli.model, bank, output, batch, **known))
    return 0
