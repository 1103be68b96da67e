"""A torch.export program of the ensemble: codes of all samples as buffers, dequantized in the graph."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.export.network import Inputs, Single, Subject, posterior, prepared, traced
from lightning_lpsgld.export.outcome import Export, median_seconds
from lightning_lpsgld.predictive.batches import default_logits
from lightning_lpsgld.predictive.members import evaluation_mode
from lightning_lpsgld.predictive.reading import TaskName
from lightning_lpsgld.predictive.swap import swapped_weights
from lightning_lpsgld.predictive.tasks import Task

__all__ = ["export_program"]


class _Stacked(nn.Module):
    """All samples one after the other: vectorized over samples, convolutions would fix the size of the batch."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self._single: list[Single] = [subject.single]  # its weights are no part
        self.head = subject.head
        for number, tensor in enumerate(subject.packed):
            self.register_buffer(f"values_{number}", tensor.values.clone())
            if tensor.scales is not None:
                self.register_buffer(f"scales_{number}", tensor.scales.clone())
        self.count, self.samples = len(subject.packed), len(subject.bank)

    def forward(self, x: Inputs) -> dict[str, Tensor]:
        members = []
        for sample in range(self.samples):
            tensors = []
            for number in range(self.count):
                values, scales = getattr(self, f"values_{number}"), getattr(self, f"scales_{number}", None)
                own = values[sample]
                tensors.append(own if scales is None else own.float() * scales[sample])
            members.append(self._single[0](x, *tensors))
        return posterior(members, self.head)


@torch.no_grad()
def export_program(
    module: nn.Module,
    bank: SampleBank | str | os.PathLike[str],
    path: str | os.PathLike[str],
    batch: Any,
    *,
    task: TaskName | Task = "auto",
    forward: Callable[[nn.Module, Any], Any] = default_logits,
    noise_std: float | None = None,
    max_length: int | None = None,
) -> Export:
    """Write the ensemble of a bank as a ``torch.export`` program (``.pt2``), and check it against the ensemble.

    ``torch.export.load(path).module()(x)`` gives a mapping with the outputs of :func:`.export_onnx`; ``x`` is a
    tensor, or a dict of tensors for tokenized batches. Neither this package nor the module's class is needed for that.
    Weights are codes and power-of-two scales; the graph has the network once a sample. The first dim of ``x`` is free.

    Args:
        module: Built like the one that was sampled, float32; not changed.
        bank: The samples, or their path.
        path: The file.
        batch: Real inputs (or a batch with targets), two rows or more.
        task: As for :func:`.export_onnx`.
        forward: ``forward(module, inputs)`` gives the output, where it is not ``module(inputs)``.
        noise_std: Standard deviation around values of a regression that gives no variance.
        max_length: As for :func:`.export_onnx`.

    Returns:
        Size, largest difference, latency (both in PyTorch).

    Raises:
        ValueError: If the bank is empty, the task or the inputs cannot be exported, or the length cannot be free.
        RuntimeError: If ``torch.export`` cannot trace the module.
        BankError: If the module is not the one that was sampled.
    """
    subject = prepared(module, bank, batch, task, forward, noise_std, max_length)
    called, inputs = subject.ensemble.called, subject.inputs
    with swapped_weights(module), evaluation_mode(called), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = traced(_Stacked(subject), inputs, (), max_length)
        alone = median_seconds(lambda: called(inputs))
    torch.export.save(program, str(path))
    loaded = torch.export.load(str(path)).module()
    return Export(
        path=Path(path),
        samples=len(subject.bank),
        bytes=Path(path).stat().st_size,
        bytes_fp32=subject.bank.nbytes_fp32,
        difference=subject.differences(loaded),
        points=subject.points,
        seconds=median_seconds(lambda: loaded(inputs)),
        seconds_fp32=len(subject.bank) * alone,
        versions=f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)",
    )
