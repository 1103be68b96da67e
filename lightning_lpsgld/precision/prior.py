"""The Gaussian prior that a run asks for: where it is centred, and how wide it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_lpsgld.precision.parts import matching_parameters
from lightning_lpsgld.precision.weights import read_parameters
from lightning_lpsgld.samplers import LangevinOptimizer
from lightning_lpsgld.samplers.grid import GridSampler

__all__ = ["Prior", "PriorMean", "names_a_file"]

#: ``"zero"``, ``"initial"``, or a file of weights.
PriorMean = str | os.PathLike[str]


def names_a_file(prior_mean: PriorMean) -> bool:
    """Whether a prior's mean is given by a file: a path, or a string with a directory or a suffix.

    Example:
        >>> names_a_file("initial"), names_a_file("runs/last.ckpt")
        (False, True)
    """
    if not isinstance(prior_mean, str):
        return isinstance(prior_mean, os.PathLike)
    return len(PurePath(prior_mean).parts) > 1 or PurePath(prior_mean).suffix != ""


@dataclass(frozen=True)
class Prior:
    """What the plugin's ``prior_mean`` and ``prior_std`` ask for.

    Attributes:
        mean: Where weight decay pulls to.
        std: Standard deviation at T = 1, of all weights or by name; ``None``: the optimizer's weight decay says it.
        required: Whether a file must be there; a resumed run has the means in its optimizer's state.
    """

    mean: PriorMean = "zero"
    std: float | Mapping[str, float] | None = None
    required: bool = True

    @property
    def mode(self) -> Literal["zero", "initial"]:
        """What the samplers are asked for; means of a file are put in place of the initial weights."""
        return "zero" if self.mean == "zero" else "initial"

    @property
    def centre(self) -> str:
        """For display, and for comparing runs: ``"zero"``, ``"initial"``, or the file's name without directories."""
        return self.file or str(self.mean)

    @property
    def file(self) -> str | None:
        """Name of the file that the mean is given by, if there is one."""
        return PurePath(self.mean).name if names_a_file(self.mean) else None

    @property
    def asks(self) -> bool:
        """Whether anything is asked for that the module's optimizers do not say."""
        return self.std is not None or self.mode != "zero"

    def decays(self, module: Module, names: Sequence[str], num_data: int) -> dict[Tensor, float | None]:
        """Weight decay 1/(N s^2) of parameters; ``None``: that of its group. The first pattern that matches counts.

        Raises:
            ValueError: If a pattern matches nothing.
        """
        patterns: Mapping[str, float] = {} if self.std is None else {"*": self.std}  # type: ignore[dict-item]
        patterns = self.std if isinstance(self.std, Mapping) else patterns
        stds: dict[str, float] = {}
        for pattern, value in patterns.items():
            for name in matching_parameters(module, [pattern], "prior_std"):
                stds.setdefault(name, float(value))
        return {module.get_parameter(n): 1.0 / (num_data * stds[n] ** 2) if n in stds else None for n in names}

    def take_up(self, samplers: Sequence[Optimizer], module: Module, names: Sequence[str]) -> None:
        """Give samplers the means of a file, if there is one; to be called before they round their parameters.

        Args:
            samplers: Of the run; those that are none are passed over.
            module: The module.
            names: Of the parameters that are sampled, or may be.

        Raises:
            FileNotFoundError: If there is no file.
            TypeError: If a sampler cannot be told a mean.
            ValueError: If the file has no tensor for a parameter, or one of another shape.
        """
        if self.file is None:
            return
        try:
            found = read_parameters(module, names, self.mean, "prior_mean")
        except FileNotFoundError:
            if self.required:
                raise
            rank_zero_warn(
                f"LowPrecisionSGLD: prior_mean={os.fspath(self.mean)!r} is not there any more. The resumed run keeps "
                "the means that it had; parameters that join it later are pulled to the weights they join with."
            )
            return
        means: dict[Tensor, Tensor] = {module.get_parameter(name): value for name, value in found.items()}
        for sampler in samplers:
            if isinstance(sampler, GridSampler):
                sampler.centre_prior(means)
            elif isinstance(sampler, LangevinOptimizer):
                raise TypeError(
                    f"{type(sampler).__name__} cannot be told the mean of its prior, so prior_mean={self.centre!r} "
                    "would do nothing. Use SGLD, SGHMC or PreconditionedSGLD, or prior_mean='zero'."
                )
