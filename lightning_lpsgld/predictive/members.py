"""The members of an ensemble: one after the other through one set of tensors, or all at once by ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from lightning_lpsgld.arithmetic import Arithmetic, check_choice
from lightning_lpsgld.bank import SampleBank, module_tensors
from lightning_lpsgld.predictive.batch_norm import refresh_batch_norm
from lightning_lpsgld.predictive.integers import layer_arithmetic
from lightning_lpsgld.predictive.swap import swapped_weights

__all__ = [
    "Called",
    "check_how",
    "evaluation_mode",
    "refreshed_statistics",
    "stack",
    "stacked_outputs",
    "streamed_outputs",
]


class Called(nn.Module):
    """A module seen through the function that calls it, so that its tensors can be replaced for one call.

    Args:
        module: The module.
        rule: ``rule(module, batch)`` gives its output.
    """

    def __init__(self, module: nn.Module, rule: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module, self.rule = module, rule

    def forward(self, batch: Any, arithmetic: Arithmetic = "simulated") -> Any:
        """Output of the module for a batch, its layers' products in an arithmetic."""
        with layer_arithmetic(self.module, arithmetic):
            return self.rule(self.module, batch)

    def call_with(self, tensors: Mapping[str, Tensor], batch: Any, arithmetic: Arithmetic = "simulated") -> Any:
        """Output with ``tensors`` (by the module's names) in place of its own; these are left alone."""
        return functional_call(self, {f"module.{name}": value for name, value in tensors.items()}, (batch, arithmetic))


def check_how(members: str, memory_limit: int, chunk: int, arithmetic: str) -> None:
    """Refuse what an ensemble cannot do with its members.

    Raises:
        ValueError: If ``members`` or ``arithmetic`` is unknown, they exclude each other, or a number is no int >= 1.
    """
    check_choice("PosteriorEnsemble", arithmetic)
    if members == "stacked" and arithmetic == "integer":
        raise ValueError(
            "PosteriorEnsemble: members='stacked' computes all members at once, in floats; with arithmetic='integer' "
            "use members='streamed'."
        )
    if members not in ("auto", "stacked", "streamed"):
        raise ValueError(f"PosteriorEnsemble: `members` must be 'auto', 'stacked' or 'streamed', got {members!r}.")
    for name, value in {"memory_limit": memory_limit, "chunk": chunk}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"PosteriorEnsemble: `{name}` must be an int >= 1, got {value!r}.")


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; training flags are as before afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def streamed_outputs(
    called: Called, bank: SampleBank, extra: list[dict[str, Tensor]], batch: Any, scratch: dict[str, Tensor],
    arithmetic: Arithmetic,
) -> Iterator[Any]:  # fmt: skip
    """Output of one member after the other; in memory are the codes of all and the values of one.

    Args:
        called: The module.
        bank: Its samples.
        extra: Tensors that replace stored ones, per sample; empty: none.
        batch: What ``called`` takes.
        scratch: Tensors by name that values are decoded into; made by the first call.
        arithmetic: Of the products of layers.
    """
    own = module_tensors(called.module)
    assert bank.spec is not None
    names = [entry.name for entry in bank.spec.entries]  # tied names once, as functional_call wants them
    if any(name not in scratch or scratch[name].device != own[name].device for name in names):
        scratch.clear()
        scratch.update({name: torch.empty_like(own[name], requires_grad=False) for name in names})
    for index in range(len(bank)):
        values = bank.sample(index).state_dict() | (extra[index] if extra else {})
        for name in names:
            scratch[name].copy_(values[name])
        yield called.call_with(scratch, batch, arithmetic)


def stack(bank: SampleBank, extra: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Values of all members by name, shape ``(members, *shape)``, on the CPU; tied names once.

    Args:
        bank: The samples.
        extra: Tensors that replace stored ones, per sample; empty: none.
    """
    assert bank.spec is not None
    names = [entry.name for entry in bank.spec.entries]
    rows = [sample.state_dict() for sample in bank]
    rows = [{**row, **extra[i]} for i, row in enumerate(rows)] if extra else rows
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def stacked_outputs(called: Called, stacked: Mapping[str, Tensor], batch: Any, chunk: int) -> Iterator[Any]:
    """Output of every member, ``chunk`` of them computed at once.

    Raises:
        RuntimeError: If the module does something that ``torch.func.vmap`` cannot do for all members at once.
    """
    members = len(next(iter(stacked.values())))
    for start in range(0, members, chunk):
        part = {name: value[start : start + chunk] for name, value in stacked.items()}
        together = vmap(called.call_with, in_dims=(0, None))(part, batch)
        for index in range(min(chunk, members - start)):
            yield tree_map(lambda value, i=index: value[i] if isinstance(value, Tensor) else value, together)


def refreshed_statistics(
    module: nn.Module, bank: SampleBank, batches: Iterable[Any], rule: Callable[[nn.Module, Any], Any]
) -> list[dict[str, Tensor]]:
    """BatchNorm statistics of every sample, measured on ``batches``; the module is as before afterwards.

    Returns:
        Per sample, the buffers that differ from those stored with it, on the CPU; an empty list if the module has no
        BatchNorm layer.
    """
    found = []
    with torch.no_grad(), swapped_weights(module):
        for index in range(len(bank)):
            bank.load_into(module, index)
            if not refresh_batch_norm(module, batches, forward=rule):
                return []
            stored = bank.sample(index).state_dict()
            now = module_tensors(module)
            found.append({n: t.detach().cpu().clone() for n, t in now.items() if not torch.equal(t.cpu(), stored[n])})
    return found
