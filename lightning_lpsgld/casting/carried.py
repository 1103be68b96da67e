"""For whoever multiplies codes: the codes that a layer's input carries, or why it carries none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_lpsgld.casting.hooks import sessions_on
from lightning_lpsgld.casting.pending import Pending, settled
from lightning_lpsgld.casting.session import Session
from lightning_lpsgld.casting.storage import storage_pointer
from lightning_lpsgld.ops import Encoded

__all__ = ["carried_codes"]

NETWORK_INPUT = ""


@contextmanager
def carried_codes(module: nn.Module) -> Iterator[Callable[[Tensor], tuple[Encoded | None, str]] | None]:
    """Let the casts of a module carry codes.

    Args:
        module: A module with an :class:`ActivationCasting` on it.

    Yields:
        A function of a tensor: its codes in its shape, or ``None`` and why there are none (``""``: it is the network's
        input, which is not rounded). ``None`` in the function's place if nothing is cast in the module.

    Example:
        >>> import torch
        >>> from lightning_lpsgld.casting import ActivationCasting
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
        >>> casting = ActivationCasting(net, seed=0).attach()
        >>> seen = []
        >>> with carried_codes(net) as codes_of:
        ...     hook = net[2].register_forward_pre_hook(lambda layer, args: seen.append(codes_of(args[0])[0]))
        ...     _ = net(torch.ones(1, 2))
        >>> seen[0].codes.shape, str(seen[0].format)
        (torch.Size([1, 3]), 'bfp8')
    """
    sessions = [session for session in sessions_on(module) if session.active]
    for session in sessions:
        session.caster.ask()
    try:
        yield (lambda x: _codes_of(sessions, x)) if sessions else None
    finally:
        for session in sessions:
            session.caster.unask()


def _codes_of(sessions: list[Session], x: Tensor) -> tuple[Encoded | None, str]:
    waiting = x.codes() if isinstance(x, Pending) else None
    if waiting is not None:
        for session in sessions:
            session.caster.taken.add(waiting[1])
        return waiting[0], ""
    x = settled(x)
    for session in sessions:
        codes = session.caster.book.of(x)
        if codes is not None:
            session.caster.taken.add(codes.site)
            aligned = codes.aligned(x)
            return aligned, "" if aligned is not None else "its input is a part, or a transposed view, of a cast tensor"
    for session in sessions:
        call = session.calls.call
        if session.caster.activations is None:
            return None, "activations are not rounded"
        if call is not None and (call.index == 0 or storage_pointer(x) in call.inputs):
            return None, NETWORK_INPUT
    return None, "its input is not a rounded activation"
