"""The begin of a forward call as a node of compiled graphs; imported when a graph is first traced."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.casting.draws import advance

__all__ = ["open_forward"]


@torch.library.custom_op("lpsgld::open_forward", mutates_args=("state",))
def open_forward(state: Tensor, training: bool) -> Tensor:
    """:meth:`ForwardCounter.open` as a node of a compiled graph.

    Args:
        state: The counter's tensor; counts up in place when the node runs, not when it is compiled.
        training: Whether the call counts as training.

    Returns:
        int64 tensor (seed in two's complement, step).

    Raises:
        RuntimeError: If it runs in backward.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "A compiled network is run again in backward (activation checkpointing around it), where its draws cannot "
            "be repeated. Compile the part that calls `checkpoint` too, or checkpoint inside of no compiled network."
        )
    return torch.tensor(advance(state, training), dtype=torch.int64)


@open_forward.register_fake
def _(state: Tensor, training: bool) -> Tensor:
    return state.new_empty(2)
