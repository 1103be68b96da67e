"""The network of one sample as a function of its input and its tensors, and what becomes of all samples' answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.export.weights import PackedTensor, pack
from lightning_lpsgld.predictive import PosteriorEnsemble
from lightning_lpsgld.predictive.batches import by_keyword, default_inputs
from lightning_lpsgld.predictive.members import Called
from lightning_lpsgld.predictive.outputs import GaussianOutput
from lightning_lpsgld.predictive.reading import TaskName
from lightning_lpsgld.predictive.reduction import open_output, task_of
from lightning_lpsgld.predictive.tasks import Multiclass, Regression, Task, logits_in

__all__ = ["Head", "Inputs", "Single", "Subject", "checked_inputs", "named", "posterior", "prepared", "traced"]

#: What a module is called with: one tensor, or tensors by name (as tokenizers give them).
Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """How the output of one sample becomes tensors that can be averaged over samples.

    Attributes:
        task: What is predicted.
        noise_variance: Variance around values that come without one.
    """

    task: Task
    noise_variance: float = 0.0

    @property
    def kind(self) -> Literal["classes", "labels", "numbers"]:
        """One of several classes (also no and yes), several labels, or numbers."""
        if isinstance(self.task, Regression):
            return "numbers"
        return "labels" if self.task.name == "multilabel" else "classes"

    def __call__(self, output: Any) -> tuple[Tensor, ...]:
        """Probabilities with the classes in dim 1, or mean and variance; float32."""
        opened = open_output(output, self.task)
        if self.kind == "numbers":
            if isinstance(opened, GaussianOutput):
                return opened.mean.float(), opened.variance.float().expand_as(opened.mean)
            return opened.float(), torch.full_like(opened.float(), self.noise_variance)
        logits = logits_in(opened, self.task.name).float()
        if isinstance(self.task, Multiclass):
            dim = 1 if self.task.class_dim is None else self.task.class_dim
            return (logits.movedim(dim, 1).softmax(1),)
        logits = logits if self.kind == "labels" else logits.reshape(-1)
        return (torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=1),)


class Single(nn.Module):
    """``forward(x, *tensors)``: what one sample says, with these tensors in place of the module's own.

    Args:
        called: The module and how it is called; runs in evaluation mode.
        names: Names of the tensors, in order.
        head: What to make of its output.
    """

    def __init__(self, called: Called, names: Sequence[str], head: Head) -> None:
        super().__init__()
        self.called, self.names, self.head = called, list(names), head

    def forward(self, x: Inputs, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the head makes of the output for a batch ``x``."""
        return self.head(self.called.call_with(dict(zip(self.names, tensors)), x))


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        bank: The samples.
        ensemble: Them as PyTorch averages them.
        inputs: What the file is checked on, on the CPU.
        packed: Tensors of all samples.
        head: What to make of an output.
        max_length: Up to which the second dim of the inputs is free, if it is.
    """

    bank: SampleBank
    ensemble: PosteriorEnsemble
    inputs: Inputs
    packed: list[PackedTensor]
    head: Head
    max_length: int | None

    @property
    def points(self) -> int:
        """Rows of the inputs."""
        return len(next(iter(self.named.values())))

    @property
    def named(self) -> dict[str, Tensor]:
        """Inputs by name."""
        return named(self.inputs)

    @property
    def checks(self) -> list[Inputs]:
        """Inputs that the file is checked on."""
        return [self.inputs, *([_shortened(self.inputs)] if self.max_length is not None else [])]

    def differences(self, answer: Callable[[Inputs], Mapping[str, Tensor]]) -> dict[str, float]:
        """Largest difference of each output from PyTorch's, over all inputs that are checked."""
        found: dict[str, float] = {}
        for inputs in self.checks:
            expected = self.ensemble(inputs).tensors()
            for name, value in answer(inputs).items():
                found[name] = max(found.get(name, 0.0), float((value - expected[name]).abs().max()))
        return found

    @property
    def single(self) -> Single:
        """The network of one sample."""
        return Single(self.ensemble.called, [tensor.name for tensor in self.packed], self.head)


def named(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs by name; ``input`` if there is one that has none."""
    return {"input": inputs} if isinstance(inputs, Tensor) else inputs


def checked_inputs(batch: Any, max_length: int | None) -> Inputs:
    """The inputs of a batch: one tensor, or those of a mapping that is passed on by keyword.

    Raises:
        ValueError: If they are something else, not of two rows or more, or with ``max_length`` not of one length.
    """
    named = by_keyword(batch)
    parts = {"input": default_inputs(batch)} if named is None else named
    if not all(isinstance(part, Tensor) and part.ndim for part in parts.values()):
        wrong = next(type(part).__name__ for part in parts.values() if not isinstance(part, Tensor) or not part.ndim)
        raise ValueError(
            f"export: takes modules of one input tensor, or tensors by name as tokenizers give, got {wrong}."
        )
    rows = {len(part) for part in parts.values()}
    if len(rows) > 1 or min(rows) < 2:
        raise ValueError(f"export: takes a batch of two rows or more, got {', '.join(map(str, sorted(rows)))} rows.")
    lengths = {part.shape[1] if part.ndim > 1 else 0 for part in parts.values()}
    if max_length is not None and (len(lengths) > 1 or min(lengths) < 4 or max_length < max(lengths)):
        raise ValueError(
            "export: `max_length` takes inputs whose second dim is the length, the same in all, from 4 to "
            f"{max_length}, got "
            f"{', '.join(f'{name} {tuple(part.shape)}' for name, part in parts.items())}."
        )
    here = {name: part.detach().cpu() for name, part in parts.items()}
    return here["input"] if named is None else here


def _shortened(inputs: Inputs) -> Inputs:
    """The first half of every sequence, for a check that a free length is one."""
    if isinstance(inputs, Tensor):
        return inputs[:, : inputs.shape[1] // 2].contiguous()
    return {name: part[:, : part.shape[1] // 2].contiguous() for name, part in inputs.items()}


def prepared(
    module: nn.Module,
    bank: SampleBank | str | os.PathLike[str],
    batch: Any,
    task: TaskName | Task,
    forward: Callable[[nn.Module, Any], Any],
    noise_std: float | None,
    max_length: int | None,
) -> Subject:
    """Open and check what is to be exported.

    Raises:
        ValueError: If the bank is empty, or the task or the inputs cannot be exported.
        BankError: If the module is not the one that was sampled.
    """
    bank = bank if isinstance(bank, SampleBank) else SampleBank.open(bank)
    if bank.needs_base:
        bank.give_base(module)
    inputs, packed = checked_inputs(batch, max_length), pack(bank)
    ensemble = PosteriorEnsemble(module, bank, task=task, forward=forward, noise_std=noise_std, members="streamed")
    with closing(ensemble.outputs(inputs)) as outputs:
        opened = open_output(next(outputs), ensemble.task)
    found = task_of(opened, ensemble.task)
    first = opened.mean if isinstance(opened, GaussianOutput) else opened
    wrong = first.ndim == 0 or (isinstance(found, Multiclass) and (first.ndim < 2 or first.shape[1] < 2))
    if wrong or (found.name == "binary" and first.ndim == 2 and first.shape[1] > 1):
        raise ValueError(
            "export: takes logits (n, classes, ...), one logit a point with task='binary', (n, labels) with task="
            f"'multilabel', or values with task='regression'; got task={found.name!r} and {tuple(first.shape)}."
        )
    known = found.noise_variance if isinstance(found, Regression) else None
    head = Head(found, (ensemble.noise_variance or 0.0) if known is None else known)
    return Subject(bank, ensemble, inputs, packed, head, max_length)


def _free_dims(inputs: Inputs, max_length: int | None) -> Any:
    """``dynamic_shapes`` of inputs whose first dim is free, and up to ``max_length`` the second one too."""
    free = {0: torch.export.Dim("batch", min=2)}
    if max_length is not None:
        free[1] = torch.export.Dim("length", min=2, max=max_length)
    return free if isinstance(inputs, Tensor) else dict.fromkeys(inputs, free)


def traced(module: nn.Module, inputs: Inputs, tensors: tuple[Tensor, ...], max_length: int | None) -> Any:
    """The exported program of a module that takes these inputs and, one by one, these tensors.

    Raises:
        ValueError: If the length is to be free and cannot be.
        RuntimeError: If ``torch.export`` cannot trace the module.
    """
    shapes = (_free_dims(inputs, max_length), *((tuple({} for _ in tensors),) if tensors else ()))
    try:
        return torch.export.export(module, (inputs, *tensors), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if max_length is None:
            raise RuntimeError(
                f"export: torch.export cannot trace this network: {_reason(error)}. Its forward must not "
                "branch on values of tensors; pass forward=function(module, inputs) that calls a part that does not."
            ) from error
        try:
            traced(module, inputs, tensors, max_length=None)
        except Exception:  # it is not about the length
            raise error from None
        raise ValueError(
            f"export: this network cannot be exported for sequences of any length up to {max_length}: "
            f"{_reason(error)} Make `max_length` smaller, or leave it out: the file then takes "
            "the length of your batch."
        ) from error


def _reason(error: Exception) -> str:
    """What the exporter says, without what it prints about itself."""
    return " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__


def posterior(answers: Sequence[tuple[Tensor, ...]], head: Head) -> dict[str, Tensor]:
    """What all samples said to the named outputs of the file."""
    if head.kind == "numbers":
        means, variances = (torch.stack(parts) for parts in zip(*answers))
        mean = means.mean(0)
        return {"mean": mean, "epistemic": (means - mean).square().mean(0), "aleatoric": variances.mean(0)}
    p = torch.stack([answer[0] for answer in answers])
    mean = p.mean(0)
    total = -(mean * mean.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(1)
    expected = -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(2).mean(0)
    return {
        "mean": mean[:, 1] if head.kind == "labels" else mean,
        "predictive_entropy": total,
        "mutual_information": (total - expected).clamp(min=0.0),
    }
