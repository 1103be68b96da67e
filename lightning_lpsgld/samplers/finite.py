"""Whether loss and gradients of a step are finite: read at once on a CPU, one step late on an accelerator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.ops import cpu_finite
from lightning_lpsgld.samplers.shards import all_finite, local_part

__all__ = ["FiniteCheck"]


def reads_late(device: torch.device) -> bool:
    """Whether reading a flag now would make the host wait for the device."""
    return device.type != "cpu"


@dataclass
class _Pending:
    """A check that was queued and not read: flags on their way to the host, and when they are there."""

    flags: Tensor
    ready: Any
    names: Callable[[int], str]
    step: int

    def read(self) -> Tensor:
        if self.ready is not None:
            self.ready.synchronize()
        return self.flags.cpu()


class FiniteCheck:
    """The finite check of one sampler.

    On a CPU a bad step is refused before it is made. On an accelerator the flags are read when the next step is about
    to be made, or by :meth:`settle`, which everything that would keep the weights has to call first. What was found
    late stands until :meth:`forget`: the weights hold it.
    """

    def __init__(self) -> None:
        self._pending: _Pending | None = None
        self._found: str | None = None

    @property
    def waiting(self) -> bool:
        """Whether the flags of a step have not been read."""
        return self._pending is not None

    def forget(self) -> None:
        """Other weights were loaded."""
        self._pending = self._found = None

    def stand(self, problem: str) -> None:
        """Let a problem that the weights hold stand until :meth:`forget`."""
        self._pending, self._found = None, problem

    def settle(self) -> None:
        """Read what has not been read.

        Raises:
            FloatingPointError: If a step that has been made had a NaN or infinite loss or gradient.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            problem = _problem(pending.read(), pending.names)
            if problem:
                self._found = (
                    f"{problem} at step {pending.step}, which was known only after the step was made (on an "
                    "accelerator the check is read one step late): the weights hold it now. No state, checkpoint or "
                    "sample is given out. Go back to the last checkpoint, and lower the learning rate, clip gradients, "
                    "or check the data."
                )
        if self._found is not None:
            raise FloatingPointError(self._found)

    def check(
        self, loss: Any, params: Sequence[Tensor], grads: Sequence[Tensor], name_of: Callable[[Tensor], str], step: int
    ) -> None:
        """Check a step that is about to be made; settle the one before.

        Args:
            loss: What the closure returned; looked at if it is a tensor.
            params: Parameters that have a gradient.
            grads: Their gradients; sharded ones are checked over all ranks.
            name_of: Name of a parameter, for messages.
            step: Number of the step, for messages.

        Raises:
            FloatingPointError: If this step is bad and that can be known without waiting, or an earlier one was.
        """
        self.settle()
        has_loss = isinstance(loss, Tensor)
        if has_loss and not reads_late(loss.device) and not bool(torch.isfinite(loss).all()):
            raise FloatingPointError(f"The loss is {loss.tolist()} at step {step}; no parameter was changed.")
        if not params:
            return
        device = local_part(params[0]).device
        own = [local_part(grad) for grad in grads]
        own = [grad if grad.numel() else grad.new_zeros(1) for grad in own]  # a rank may hold no row of a shard
        flags = all_finite(_finite_flags(own).to(device), list(params))
        if not reads_late(flags.device):
            problem = _problem(flags, lambda i: f"the gradient of {name_of(params[i])}")
            if problem:
                raise FloatingPointError(
                    f"{problem} at step {step}. The step was refused: no parameter was changed. Lower the learning "
                    "rate, clip gradients, or check the data."
                )
            return
        first = torch.isfinite(loss).all().to(device) if has_loss else torch.ones((), dtype=torch.bool, device=device)
        named = [*params]
        self._pending = _sent(
            torch.cat([first.reshape(1), flags]),
            lambda i: "the loss" if i == 0 else f"the gradient of {name_of(named[i - 1])}",
            step,
        )


def _sent(flags: Tensor, names: Callable[[int], str], step: int) -> _Pending:
    """Let flags travel to the host; on CUDA an event says when they have come, elsewhere reading them waits."""
    if flags.device.type != "cuda":
        return _Pending(flags, None, names, step)
    there = flags.to("cpu", non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(flags.device))
    return _Pending(there, ready, names, step)


def _problem(finite: Tensor, names: Callable[[int], str]) -> str:
    bad = (~finite).nonzero().flatten().tolist()
    if not bad:
        return ""
    rest = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    text = f"{', '.join(map(names, bad[:3]))}{rest} is NaN or infinite"
    return text[0].upper() + text[1:]


def _finite_flags(grads: list[Tensor]) -> Tensor:
    """Which tensors are finite throughout, shape ``(len(grads),)``."""
    if grads[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(grads, math.inf)).isfinite()  # one look: each one would be four kernels
    flags = torch.empty(len(grads), dtype=torch.bool)
    read = [cpu_finite.readable(grad) for grad in grads]
    for chosen, look in ((True, cpu_finite.finite_flags), (False, _flags_by_norms)):
        places = [i for i, yes in enumerate(read) if yes is chosen]
        if places:
            flags[places] = look([grads[i] for i in places])
    return flags


def _flags_by_norms(grads: list[Tensor]) -> Tensor:
    """Without a kernel: sums of squares, a tenth of the maximum's time; where one overflows, elements are looked at."""
    flags = torch.stack([norm.isfinite() for norm in torch._foreach_norm(grads)])
    for i in (~flags).nonzero().flatten().tolist():
        flags[i] = grads[i].isfinite().all()
    return flags
