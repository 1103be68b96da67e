"""LightningCLI with the plugin and the callbacks as short names: ``lpsgld fit --config config.yaml``.

Needs the extra ``cli`` (jsonargparse).
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_lpsgld.callbacks import EffectiveTemperature, EnsembleEvaluation, SampleCollector
from lightning_lpsgld.precision import LowPrecisionSGLD

__all__ = ["LowPrecisionCLI", "main"]


class LowPrecisionCLI(LightningCLI):
    """A LightningCLI with a ``lpsgld`` section for the plugin; callbacks are known by their class names.

    The section holds the arguments of :class:`LowPrecisionSGLD`; what is left out keeps its default. Any
    LightningModule and DataModule can be given by class path::

        lpsgld fit --model my.Module --data my.DataModule --lpsgld.temperature 1e-3 \
            --trainer.callbacks+=SampleCollector --trainer.callbacks.start=0.5

    Args:
        args: As for :class:`lightning.pytorch.cli.LightningCLI`; so are the keyword arguments.
    """

    #: Importing these makes their short names known to the parser.
    callbacks = (SampleCollector, EnsembleEvaluation, EffectiveTemperature)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the ``lpsgld`` section."""
        parser.add_class_arguments(LowPrecisionSGLD, "lpsgld")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the configured plugin to the trainer's."""
        plugin = self.config_init[self.subcommand].lpsgld if self.subcommand else self.config_init.lpsgld
        if not isinstance(plugin, LowPrecisionSGLD):
            plugin = LowPrecisionSGLD(**plugin)
        configured = self._get(self.config_init, "trainer").get("plugins") or []
        given = configured if isinstance(configured, list) else [configured]
        return super().instantiate_trainer(**{**kwargs, "plugins": [*given, plugin]})


def main(args: ArgsType = None) -> None:
    """Entry point of the ``lpsgld`` command."""
    LowPrecisionCLI(save_config_callback=None, args=args)


if __name__ == "__main__":
    main()
