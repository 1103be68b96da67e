"""``lpsgld fit|validate|test|predict``: LightningCLI with the plugin, the callbacks and the ensemble of a bank."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_lpsgld.arithmetic import Arithmetic
from lightning_lpsgld.callbacks import (
    ChainDiagnostics,
    EffectiveTemperature,
    EnsembleEvaluation,
    SampleCollector,
    SamplingProgress,
)
from lightning_lpsgld.cli.configs import check_configs
from lightning_lpsgld.cli.errors import CommandError, in_one_line, inner_reason, key_of, one_line
from lightning_lpsgld.cli.opened import opened_bank
from lightning_lpsgld.cli.outputs import checked_file
from lightning_lpsgld.cli.refusals import parse_message
from lightning_lpsgld.precision import LowPrecisionSGLD
from lightning_lpsgld.serving import PosteriorModule, PredictionWriter

__all__ = ["COMMANDS", "EnsembleOptions", "LowPrecisionCLI", "parsers", "run"]

#: Command -> (what it does, an example).
COMMANDS = {
    "fit": ("train and collect samples", "lpsgld fit --config run.yaml --lpsgld.temperature 1e-3"),
    "validate": ("score on the validation data", "lpsgld validate --config run.yaml --ensemble.bank bank"),
    "test": ("score on the test data", "lpsgld test --config run.yaml --ensemble.bank bank"),
    "predict": (
        "predict, with uncertainties, to a file",
        "lpsgld predict --config run.yaml --ensemble.bank bank --ensemble.output predictions.parquet",
    ),
}


@dataclass
class EnsembleOptions:
    """Run the ensemble of a bank in place of the model's own weights (validate, test, predict).

    Args:
        bank: Path of the bank.
        output: Where ``predict`` writes, .parquet or .csv.
        coverage: Calibrate prediction sets of this coverage on the validation data.
        task: As for PosteriorEnsemble.
        noise_std: As for PosteriorEnsemble.
        refresh_batch_norm: Measure BatchNorm statistics anew on the training data.
        arithmetic: As for PosteriorEnsemble.
    """

    bank: str | None = None
    output: str | None = None
    coverage: float | None = None
    task: Literal["auto", "multiclass", "binary", "multilabel", "regression"] = "auto"
    noise_std: float | None = None
    refresh_batch_norm: bool = False
    arithmetic: Arithmetic = "auto"


class LowPrecisionCLI(LightningCLI):
    """A LightningCLI with a ``lpsgld`` section for the plugin; callbacks are known by their class names.

    The section holds the arguments of :class:`LowPrecisionSGLD`; what is left out keeps its default. The section
    ``ensemble`` (:class:`EnsembleOptions`) lets validate, test and predict run the samples of a bank. Any
    LightningModule and DataModule can be given by class path::

        lpsgld fit --model my.Module --data my.DataModule --lpsgld.temperature 1e-3 \
            --trainer.callbacks+=SampleCollector --trainer.callbacks.start=0.5

    Args:
        args: As for :class:`lightning.pytorch.cli.LightningCLI`; so are the keyword arguments.

    Raises:
        CommandError: If a value is refused; the message names its key.
    """

    #: Importing these makes their short names known to the parser.
    callbacks = (
        SampleCollector,
        EnsembleEvaluation,
        EffectiveTemperature,
        ChainDiagnostics,
        SamplingProgress,
        PredictionWriter,
    )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that raises instead of printing usage and a traceback."""
        command = kwargs.get("description", "")
        examples = [example for text, example in COMMANDS.values() if text == command] or [
            "lpsgld fit --config run.yaml"
        ]
        kwargs.setdefault("epilog", f"example: {examples[0]}")
        kwargs["exit_on_error"] = False
        return super().init_parser(**kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        kwargs["description"] = COMMANDS[subcommand][0]
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections ``lpsgld`` and ``ensemble``."""
        parser.add_class_arguments(LowPrecisionSGLD, "lpsgld")
        parser.add_class_arguments(EnsembleOptions, "ensemble")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; what is refused becomes one line with its key."""
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list):
            check_configs([str(arg) for arg in given])
        try:
            super().parse_arguments(parser, args)
        except (CommandError, SystemExit):
            raise
        except Exception as error:
            raise CommandError(parse_message(error, tuple(COMMANDS))) from error

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; what one of them refuses becomes one line with its key."""
        try:
            super().instantiate_classes()
        except CommandError:
            raise
        except Exception as error:
            config = self.config[self.subcommand] if self.subcommand else self.config
            key = key_of(error, config)
            reason = one_line(inner_reason(str(error)))
            raise CommandError(f"{key}: {reason}" if key else reason) from error

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the configured plugin to the trainer's."""
        plugin = self._get(self.config_init, "lpsgld")
        if not isinstance(plugin, LowPrecisionSGLD):
            plugin = LowPrecisionSGLD(**plugin)
        configured = self._get(self.config_init, "trainer").get("plugins") or []
        given = configured if isinstance(configured, list) else [configured]
        return super().instantiate_trainer(**{**kwargs, "plugins": [*given, plugin]})

    # ---------------------------------------------------------------------------------------------- the ensemble

    def before_validate(self) -> None:
        """Take the ensemble in place of the model, if there is a bank."""
        self._use_ensemble()

    def before_test(self) -> None:
        """Take the ensemble in place of the model, if there is a bank."""
        self._use_ensemble()

    def before_predict(self) -> None:
        """Take the ensemble in place of the model, and write to a file, where asked."""
        options = self._use_ensemble()
        if options.output is not None:
            try:
                writer = PredictionWriter(options.output)
            except (ValueError, ImportError) as error:
                raise CommandError(f"ensemble.output: {one_line(error)}") from error
            checked_file(options.output, "ensemble.output")
            self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        elif options.bank is not None and not self._keeps_predictions():
            raise CommandError(
                "ensemble.output: nothing would keep the predictions; name a .parquet or .csv file, or put a "
                "BasePredictionWriter into trainer.callbacks."
            )

    def _keeps_predictions(self) -> bool:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(callback, BasePredictionWriter) for callback in callbacks)

    @property
    def ensemble_options(self) -> EnsembleOptions:
        """The section ``ensemble``."""
        options = self._get(self.config_init, "ensemble")
        return options if isinstance(options, EnsembleOptions) else EnsembleOptions(**options)

    def _use_ensemble(self) -> EnsembleOptions:
        options = self.ensemble_options
        if options.bank is None:
            for name in ("output", "coverage", "noise_std"):
                if getattr(options, name) is not None:
                    raise CommandError(f"ensemble.{name}: needs ensemble.bank.")
            return options
        self.model = self._ensemble(options)
        return options

    def _ensemble(self, options: EnsembleOptions) -> PosteriorModule:
        module = PosteriorModule.from_bank(
            self.model,
            opened_bank(options.bank or "", "ensemble.bank"),
            task=options.task,
            noise_std=options.noise_std,
            refresh_batch_norm=self._loader("train") if options.refresh_batch_norm else None,
            arithmetic=options.arithmetic,
        )
        if options.coverage is not None:
            module.ensemble.calibrate(self._loader("val"), coverage=options.coverage)
        return module

    def _loader(self, which: Literal["train", "val", "test"]) -> Any:
        if self.datamodule is None:
            source: Any = self.model
        else:
            source = self.datamodule
            source.prepare_data()
            source.setup("test" if which == "test" else "fit")
        try:
            made = getattr(source, f"{which}_dataloader")()
        except Exception as error:
            raise CommandError(
                f"data: needs {which}_dataloader() of {type(source).__name__}: {one_line(error)}"
            ) from error
        if not hasattr(made, "__iter__") or isinstance(made, (Mapping, list, tuple)):
            raise CommandError(
                f"data: {which}_dataloader() gave a {type(made).__name__}, and this takes one DataLoader; return that."
            )
        return made


class _ParsersOnly(Exception):
    """Carries the parsers out of a CLI that is not to parse anything."""


class _Parsers(LowPrecisionCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        raise _ParsersOnly(self._subcommand_parsers)


def parsers() -> dict[str, LightningArgumentParser]:
    """The parser of each command."""
    try:
        _Parsers(save_config_callback=None)
    except _ParsersOnly as made:
        found: dict[str, LightningArgumentParser] = made.args[0]
        return found
    raise AssertionError("LightningCLI no longer parses in its constructor")


def run(args: ArgsType = None) -> None:
    """Run fit, validate, test or predict.

    Args:
        args: Arguments, the command first; ``None``: those of the process.
    """
    config: dict[str, Any] = {}

    class Kept(LowPrecisionCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            super().parse_arguments(parser, args)
            config.update(self.config.get(self.config.get("subcommand"), self.config).as_dict())

    with in_one_line(config):
        Kept(save_config_callback=None, args=args)
