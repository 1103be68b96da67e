"""Tensors on the way into a bank and out of it: codes and exponents, exactly; what is no sample stays out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank.base import Base
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.spec import EntrySpec, ModuleSpec
from lightning_lpsgld.ops import Encoded, decode, encode
from lightning_lpsgld.ops.code_cell import CodeCell
from lightning_lpsgld.ops.coded import CodedTensor, plain

__all__ = ["check_has_base", "decode_into_", "encode_tensors", "is_in_base"]


@torch.no_grad()
def decode_into_(target: Tensor, encoded: Encoded) -> Tensor:
    """Write the values of ``encoded`` into ``target``, without a full-size temporary for fixed and whole-dim blocks.

    Codes are converted in place and multiplied by powers of two, so nothing is rounded; the result has the bits of
    :func:`lightning_lpsgld.ops.decode`.

    Args:
        target: Tensor of the shape of ``encoded`` and a dtype that holds its format; any device and layout.
        encoded: Codes and exponents, on any device.

    Returns:
        ``target``.
    """
    fmt = encoded.format
    if isinstance(target, CodedTensor):
        return target.copy_(CodedTensor(CodeCell(encoded), dtype=target.dtype))
    if not fmt.linear:
        return target.copy_(decode(encoded.to(target.device), target.dtype))
    target.copy_(encoded.codes)
    if fmt.gap is not None:
        return target.mul_(fmt.gap)
    gaps = fmt.gaps(encoded.exponents).to(target.device, target.dtype)
    return target.mul_(fmt.blocks.expand(gaps, target.shape))


def _encode_exactly(entry: EntrySpec, tensor: Tensor) -> dict[str, Tensor]:
    """Codes and exponents of a tensor that is on its grid; refuses one that is not."""
    assert entry.format is not None
    if isinstance(tensor, CodedTensor) and tensor.is_whole and tensor.format == entry.format:
        return _named(entry, tensor.stored().copied(torch.device("cpu")).encoded())
    tensor = plain(tensor)
    try:
        encoded = encode(tensor.detach(), entry.format, rounding="nearest")
    except ValueError as error:
        raise BankError(f"`{entry.name}` cannot be stored: {error}") from error
    back = decode_into_(torch.empty_like(tensor, requires_grad=False), encoded)
    if not torch.equal(back, tensor.detach()):
        wrong = (back != tensor).nonzero()[0].tolist()
        raise BankError(
            f"`{entry.name}` is not on the grid of {entry.format}: element {wrong} is {tensor[tuple(wrong)].item()!r}, "
            f"the nearest grid value {back[tuple(wrong)].item()!r}. Leave it out of `formats`, or quantize it first."
        )
    return _named(entry, encoded)


def _named(entry: EntrySpec, encoded: Encoded) -> dict[str, Tensor]:
    tensors = {f"codes.{entry.name}": encoded.codes.cpu()}
    if encoded.exponents is not None:
        tensors[f"exponents.{entry.name}"] = encoded.exponents.cpu()
    return tensors


def _check_finite(name: str, tensor: Tensor) -> None:
    """A sample with one NaN gives predictions that are averaged into finite, wrong scores: it is none."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return
    missing, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    finite = tensor[torch.isfinite(tensor)]
    is_mask = not isinstance(tensor, nn.Parameter) and not missing and bool((finite == finite[:1]).all())
    if not is_mask:
        raise BankError(
            f"`{name}` cannot be stored: {missing} of its {tensor.numel()} elements are NaN and {infinite} infinite: "
            "this is no sample of any posterior. Lower the learning rate, or find out where they come from."
        )


@torch.no_grad()
def encode_tensors(tensors: Mapping[str, Tensor], spec: ModuleSpec, base: Base | None = None) -> dict[str, Tensor]:
    """What a sample stores of ``tensors``: CPU copies, codes and exponents where ``spec`` has a format.

    Infinities are stored only in a tensor that is no parameter and has but one value beside them: a mask.

    Args:
        tensors: By name.
        spec: Their description.
        base: Tensors that are as they are in it are left out.

    Raises:
        BankError: If a tensor with a format is not exactly on its grid (negative zeros become positive), or an element
            is NaN or infinite.
    """
    stored: dict[str, Tensor] = {}
    for entry in spec.entries:
        tensor = tensors[entry.name]
        if base is None or not is_in_base(entry, tensor, base):
            stored.update(_encoded(entry, tensor))
    return stored


def _encoded(entry: EntrySpec, tensor: Tensor) -> dict[str, Tensor]:
    if entry.format is not None:
        return {key: value.contiguous() for key, value in _encode_exactly(entry, tensor).items()}
    tensor = plain(tensor)
    _check_finite(entry.name, tensor)
    copied = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return {f"values.{entry.name}": copied.contiguous()}


def is_in_base(entry: EntrySpec, tensor: Tensor, base: Base) -> bool:
    """Whether a module's tensor has the values that ``base`` has for an entry."""
    if entry.name not in base.digests:
        return False
    if entry.format is None:
        return base.holds(entry, {f"values.{entry.name}": tensor.detach().cpu()})
    try:
        return base.holds(entry, _encoded(entry, tensor))
    except BankError:  # not on the grid
        return False


def check_has_base(tensors: Mapping[str, Tensor], entries: Mapping[str, EntrySpec], base: Base) -> None:
    """Raise :class:`BankError` unless ``tensors`` are what ``base`` has for ``entries``, all by name."""
    wrong = [name for name, entry in entries.items() if not is_in_base(entry, tensors[name], base)]
    if wrong:
        raise BankError(
            f"The bank knows its {len(base.digests)} frozen tensors by their checksums, and `{wrong[0]}` is another "
            f"here; {len(wrong)} of {len(entries)} differ. Give the weights that training began with: build the module "
            "as it was, or `SampleBank.open(path, base=weights)`."
        )
