"""FSDP2 gathers shards as codes: what crosses the wire before a layer runs is a code a weight, and decoded exactly.

A shard stays the float tensor that it is. FSDP2 asks the local tensor of a parameter for what it should gather, if that
has methods for it; so the local tensor is given a class with such methods, which shares its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops import decode, encode
from lightning_lpsgld.ops.stored import StoredCodes

__all__ = ["GatheredAsCodes", "gather_as_codes"]


class GatheredAsCodes(Tensor):
    """A shard of whole rows on a grid; results of all operations are plain tensors.

    Attributes:
        format: The grid; no block of it crosses rows. ``None``: floats are gathered again.
    """

    format: NumberFormat | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, shard: Tensor, fmt: NumberFormat | None) -> GatheredAsCodes:
        """The same memory with this class."""
        made = shard.detach().as_subclass(cls)
        made.format = fmt
        return made

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], torch.Size]:
        """Called by FSDP2: what is to be gathered of this shard, and what :meth:`fsdp_post_all_gather` is told.

        Raises:
            RuntimeError: If the shard has left the grid.
        """
        values = self.as_subclass(Tensor)
        if self.format is None:
            return (values,), outer_size
        encoded = encode(values, self.format)
        if not torch.equal(decode(encoded, values.dtype), values):
            raise RuntimeError(
                f"A weight of shape {tuple(outer_size)} is gathered as codes of {self.format}, but somebody has moved "
                "it off that grid. Within a fit only the sampler moves it; load weights before the fit."
            )
        stored = StoredCodes.of(encoded)
        codes = stored.codes.view(torch.int8) if stored.packed else stored.codes  # all of one dtype go as they are
        return tuple(t for t in (codes, stored.exponents) if t is not None), outer_size

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], size: torch.Size, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Called by FSDP2: the whole weight, written into ``out`` where that is given."""
        if self.format is None:
            values = gathered[0].view(size).to(dtype, copy=True)
        else:
            exponents = gathered[1] if len(gathered) > 1 else None
            whole = StoredCodes.joined(gathered[0], self.shape, exponents, self.format, size)
            values = whole.decoded(self.dtype).to(dtype)
        if out is None:
            return values, (values,)
        target = out.to_local() if isinstance(out, DTensor) else out
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(target):
            target.copy_(values)
        return None


def gather_as_codes(module: nn.Module, format_of: Callable[[Tensor], NumberFormat | None]) -> tuple[int, int]:
    """Let FSDP2 gather the parameters of a module as codes, where that is exact and possible.

    It is where a parameter lies on a grid no block of which crosses rows, is sharded evenly along dim 0 alone, and was
    not gathered before.

    Args:
        module: With :func:`torch.distributed.fsdp.fully_shard` on it or its parts.
        format_of: Grid on which a parameter lies, from now on; ``None`` if on none: then floats are gathered.

    Returns:
        Bytes that a gather of all parameters of FSDP2 brings to a rank, and those that it would as floats.
    """
    now = floats = 0
    for fsdp in _parameters_of_fsdp(module):
        param = fsdp.sharded_param
        whole = param.numel() * param.element_size()
        floats += whole
        fmt = format_of(param)
        local = param._local_tensor
        if isinstance(local, GatheredAsCodes) and local.format != fmt:
            fsdp.all_gather_outputs = []  # of other sizes
        if isinstance(local, GatheredAsCodes) or (fmt is not None and _can_be(param, fmt, fsdp)):
            param._local_tensor = GatheredAsCodes.of(local, fmt)
            whole = whole if fmt is None else param.device_mesh.size() * fmt.stored_bytes(local.shape)
        now += whole
    return now, floats


def _can_be(param: DTensor, fmt: NumberFormat, fsdp: Any) -> bool:
    placements = param.placements
    return (
        len(placements) == 1
        and type(placements[0]) is Shard
        and placements[0].dim == 0
        and param.shape[0] % param.device_mesh.size() == 0
        and not fmt.blocks.crosses_rows(param.ndim)
        and not hasattr(fsdp, "_unsharded_param")
        and not getattr(fsdp, "offload_to_cpu", False)
    )


def _parameters_of_fsdp(module: nn.Module) -> list[Any]:
    """What FSDP2 holds for each parameter; none where its inner structure is another than is known."""
    found: list[Any] = []
    for part in module.modules():
        state = getattr(part, "_get_fsdp_state", lambda: None)()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        known = [p for group in groups for p in getattr(group, "fsdp_params", ())]
        found += [p for p in known if isinstance(p.sharded_param, DTensor)]
    return found
