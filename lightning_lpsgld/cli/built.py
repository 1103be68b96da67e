"""A configured run that is built but not run: model, data, trainer, for the commands that look at one."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from lightning.pytorch.cli import LightningArgumentParser

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.cli.errors import CommandError
from lightning_lpsgld.cli.opened import opened_bank
from lightning_lpsgld.cli.trainer import EnsembleOptions, LowPrecisionCLI

__all__ = ["BuiltCLI", "built", "ensemble_bank"]


class BuiltCLI(LowPrecisionCLI):
    """The configuration of a run without a command; subclasses name theirs and add its arguments."""

    prog, summary, example = "lpsgld", "", ""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Name the command."""
        named = {"prog": self.prog, "description": self.summary, "epilog": f"example: {self.example}"}
        return super().init_parser(**{**kwargs, **named})

    def loader(self, which: Literal["train", "val", "test"]) -> Any:
        """The dataloader of the configured data.

        Raises:
            CommandError: If there is none, or more than one.
        """
        return self._loader(which)

    def batch(self, which: Literal["train", "val", "test"]) -> Any:
        """The first batch of it.

        Raises:
            CommandError: If there is none.
        """
        for batch in self.loader(which):
            return batch
        raise CommandError(f"data: {which}_dataloader() gives no batch; a command needs one to look at.")


def built(kind: type[BuiltCLI], args: list[str]) -> BuiltCLI:
    """Build a configuration.

    Args:
        kind: Its class.
        args: Arguments after the command.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended.*")
        return kind(save_config_callback=None, args=args, run=False)


def ensemble_bank(options: EnsembleOptions, example: str) -> SampleBank:
    """The bank of a command that needs one.

    Args:
        options: The section ``ensemble``.
        example: A call that names one.

    Raises:
        CommandError: If none is named, or there is none, or it has no usable sample.
    """
    if options.bank is None:
        raise CommandError(f"ensemble.bank: is needed, e.g. `{example}`.")
    return opened_bank(options.bank, "ensemble.bank")
