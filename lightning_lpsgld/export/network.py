"""The network of one sample as a function of its input and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lpsgld.predictive import default_inputs

__all__ = ["Kind", "Single", "checked_inputs", "kind_of", "posterior"]

Kind = Literal["multiclass", "regression"]


class Single(nn.Module):
    """``forward(x, *tensors)``: output of a module with these tensors in place of its own.

    Args:
        module: The module; runs in evaluation mode.
        names: Names of the tensors, in order.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, list(names)

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """Output for a batch ``x``."""
        out: Tensor = functional_call(self.module, dict(zip(self.names, tensors)), (x,))
        return out


def checked_inputs(batch: Any) -> Tensor:
    """The one input tensor of a batch.

    Raises:
        ValueError: If there is not exactly one, of two rows or more.
    """
    inputs = default_inputs(batch)
    if not isinstance(inputs, Tensor) or len(inputs) < 2:
        what = f"{len(inputs)} rows" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"export: takes modules of one input tensor, and a batch of two rows or more, got {what}.")
    return inputs


def kind_of(output: Any, task: str) -> Kind:
    """What the outputs of an exported file are.

    Raises:
        ValueError: If the task cannot be exported.
    """
    tensor = isinstance(output, Tensor) and output.is_floating_point()
    if task in ("auto", "multiclass") and tensor and output.ndim >= 2 and output.shape[1] >= 2:
        return "multiclass"
    if task == "regression" and tensor:
        return "regression"
    what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"export: takes logits (n, classes, ...), or values with task='regression'; got task={task!r} and {what}."
    )


def posterior(outputs: Tensor, kind: Kind) -> dict[str, Tensor]:
    """Outputs of all samples, shape ``(samples, n, ...)``, to the named outputs of the file."""
    if kind == "regression":
        mean = outputs.mean(0)
        return {"mean": mean, "epistemic": (outputs - mean).square().mean(0)}
    p = outputs.softmax(2)
    mean = p.mean(0)
    total = -(mean * mean.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(1)
    expected = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(2).mean(0)
    return {"mean": mean, "predictive_entropy": total, "mutual_information": (total - expected).clamp(min=0.0)}
