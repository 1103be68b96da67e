"""A torch.export program of the ensemble: codes of all samples as buffers, dequantized in the graph."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.export.network import Kind, Single, checked_inputs, kind_of, posterior
from lightning_lpsgld.export.outcome import Export, median_seconds
from lightning_lpsgld.export.weights import PackedTensor, pack
from lightning_lpsgld.predictive import PosteriorEnsemble
from lightning_lpsgld.predictive.reading import TaskName
from lightning_lpsgld.predictive.swap import swapped_weights

__all__ = ["export_program"]


class _Stacked(nn.Module):
    """All samples one after the other: vectorized over samples, convolutions would fix the size of the batch."""

    def __init__(self, module: nn.Module, packed: list[PackedTensor], kind: Kind) -> None:
        super().__init__()
        self._single: list[Single] = [Single(module, [tensor.name for tensor in packed])]  # its weights are no part
        self.kind: Kind = kind
        for number, tensor in enumerate(packed):
            self.register_buffer(f"values_{number}", tensor.values.clone())
            if tensor.scales is not None:
                self.register_buffer(f"scales_{number}", tensor.scales.clone())
        self.count, self.samples = len(packed), len(packed[0].values)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        members = []
        for sample in range(self.samples):
            tensors = []
            for number in range(self.count):
                values, scales = getattr(self, f"values_{number}"), getattr(self, f"scales_{number}", None)
                own = values[sample]
                tensors.append(own if scales is None else own.float() * scales[sample])
            members.append(self._single[0](x, *tensors))
        outputs = torch.stack(members)
        return posterior(outputs, self.kind)


@torch.no_grad()
def export_program(
    module: nn.Module,
    bank: SampleBank | str | os.PathLike[str],
    path: str | os.PathLike[str],
    batch: Any,
    *,
    task: TaskName = "auto",
) -> Export:
    """Write the ensemble of a bank as a ``torch.export`` program (``.pt2``), and check it against the ensemble.

    ``torch.export.load(path).module()(x)`` gives a mapping with the outputs of :func:`.export_onnx`; neither this
    package nor the module's class is needed for that. Weights are codes and power-of-two scales; the graph has the
    network once a sample. The first dim of ``x`` is free.

    Args:
        module: Built like the one that was sampled, float32, with one input tensor; not changed.
        bank: The samples, or their path.
        path: The file.
        batch: Real inputs (or a batch with targets), two rows or more.
        task: ``"auto"`` or ``"multiclass"`` for logits, ``"regression"`` for values.

    Returns:
        Size, largest difference, latency (both in PyTorch).

    Raises:
        ValueError: If the bank is empty, or the task or the inputs cannot be exported.
        RuntimeError: If ``torch.export`` cannot trace the module.
        BankError: If the module is not the one that was sampled.
    """
    bank = bank if isinstance(bank, SampleBank) else SampleBank.open(bank)
    if bank.needs_base:
        bank.give_base(module)
    inputs, packed = checked_inputs(batch).cpu(), pack(bank)
    ensemble = PosteriorEnsemble(module, bank, task=task, members="streamed")
    kind = kind_of(next(ensemble.outputs(inputs)), task)
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    with swapped_weights(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.eval()
        program = torch.export.export(_Stacked(module, packed, kind), (inputs,), dynamic_shapes=shapes, strict=False)
        alone = median_seconds(lambda: module(inputs))
    torch.export.save(program, str(path))
    loaded = torch.export.load(str(path)).module()
    answer, expected = loaded(inputs), ensemble(inputs).tensors()
    return Export(
        path=Path(path),
        samples=len(bank),
        bytes=Path(path).stat().st_size,
        bytes_fp32=bank.nbytes_fp32,
        difference={name: float((value - expected[name]).abs().max()) for name, value in answer.items()},
        points=len(inputs),
        seconds=median_seconds(lambda: loaded(inputs)),
        seconds_fp32=len(bank) * alone,
        versions=f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)",
    )
