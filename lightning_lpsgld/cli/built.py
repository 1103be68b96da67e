"""A configured run that is built but not run: model, data, trainer, for the commands that look at one."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from lightning.pytorch.cli import LightningArgumentParser

from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.cli.errors import CommandError, key_of, one_line
from lightning_lpsgld.cli.trainer import EnsembleOptions, LowPrecisionCLI

__all__ = ["BuiltCLI", "built", "opened_bank", "with_key"]


class BuiltCLI(LowPrecisionCLI):
    """The configuration of a run without a command; subclasses name theirs and add its arguments."""

    prog, summary, example = "lpsgld", "", ""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Name the command."""
        named = {"prog": self.prog, "description": self.summary, "epilog": f"example: {self.example}"}
        return super().init_parser(**{**kwargs, **named})

    def loader(self, which: Literal["train", "val", "test"]) -> Any:
        """A dataloader of the configured data."""
        return self._loader(which)


def built(kind: type[BuiltCLI], args: list[str]) -> BuiltCLI:
    """Build a configuration.

    Args:
        kind: Its class.
        args: Arguments after the command.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended.*")
        return kind(save_config_callback=None, args=args, run=False)


def with_key(error: Exception, config: Any) -> CommandError:
    """The error as one line, with its key where it is known; what is wrong with a bank is so with ``ensemble.bank``."""
    key = "ensemble.bank" if isinstance(error, BankError) else key_of(error, config)
    return CommandError(f"{key}: {one_line(error)}" if key else one_line(error))


def opened_bank(options: EnsembleOptions, example: str) -> SampleBank:
    """The bank of a command that needs one.

    Args:
        options: The section ``ensemble``.
        example: A call that names one.

    Raises:
        CommandError: If none is named, or there is none, or it has no usable sample.
    """
    if options.bank is None:
        raise CommandError(f"ensemble.bank: is needed, e.g. `{example}`.")
    try:
        bank = SampleBank.open(options.bank)
    except (BankError, OSError) as error:
        raise CommandError(f"ensemble.bank: {one_line(error)}") from error
    if not len(bank):
        raise CommandError(
            f"ensemble.bank: {options.bank} has no usable sample, and {len(bank.damaged)} that are damaged."
        )
    return bank
