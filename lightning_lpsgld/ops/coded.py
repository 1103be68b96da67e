"""A weight that is codes: a tensor without floats, which are made for each operation that needs them and let go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_lpsgld.formats import FormatLike, NumberFormat, check_dtype, parse_format
from lightning_lpsgld.ops import schemas
from lightning_lpsgld.ops.code_cell import CodeCell
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.functional import decode
from lightning_lpsgld.ops.stored import StoredCodes

__all__ = ["CodedTensor", "initialization", "plain"]

aten = torch.ops.aten

#: In-place operations that set values rather than change them: what they give is rounded to nearest.
_SETTERS = frozenset(
    (aten.copy_.default, aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.normal_.default,
     aten.uniform_.default)
)  # fmt: skip

#: Cells whose floats may be changed in place now, at most one; ``None`` outside of :func:`initialization`.
_opened: list[CodeCell] | None = None


class CodedTensor(Tensor):
    """A floating-point tensor held as integer codes and exponents: a byte an element for ``bfp8``, half for ``bfp4``.

    To autograd and to every operation it is a float tensor of its dtype: where one needs values they are decoded,
    exactly, and let go afterwards. Views (``t``, ``view``, slices, ``split``, ``expand``, ...) and lossless casts are
    coded too and share the codes, so that autograd keeps no floats of them. Results of any other operation are plain
    tensors. Values are set by ``copy_``, ``fill_``, ``zero_``, ``normal_`` and ``uniform_``, or by assigning
    ``.data``, and rounded to nearest then; other in-place operations are refused outside of :func:`initialization`,
    because rounding would lose most of what they do.

    It is copied and saved as codes; to load what was saved, import ``lightning_lpsgld``.

    Args:
        cell: The codes.
        size, stride, offset: Geometry of a view, in elements of the whole as if it were floats; the whole by default.
        dtype: Floating dtype that it is taken for.
        seen: Version of the codes that a cast was made of.

    Example:
        >>> weight = CodedTensor.of(torch.tensor([[0.3, -1.0]]), "bfp8")
        >>> weight, weight.nbytes_stored, weight.t() @ torch.ones(1)
        (CodedTensor(shape=(1, 2), dtype=float32, format=bfp8), 3, tensor([ 0.2969, -1.0000]))
    """

    _cell: CodeCell
    _seen: int | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[CodedTensor],
        cell: CodeCell,
        size: tuple[int, ...] | None = None,
        stride: tuple[int, ...] | None = None,
        offset: int = 0,
        dtype: torch.dtype = torch.float32,
        seen: int | None = None,
    ) -> CodedTensor:
        """Make one; the docstring of the class says of what."""
        stored = cell.stored
        size, stride = stored.shape if size is None else size, stored.stride if stride is None else stride
        made: CodedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, strides=stride, storage_offset=offset, dtype=dtype, device=stored.codes.device
        )
        made._cell, made._seen = cell, seen
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # all was done in __new__

    @classmethod
    def of(cls, values: Tensor, fmt: FormatLike, finer: FormatLike | None = None) -> CodedTensor:
        """Values rounded to nearest, as codes; its memory is row-major, or channels-last where that of ``values`` is.

        Args:
            values: Floating dtype that holds the format; not modified.
            fmt: The grid.
            finer: Grid of an accumulator that will begin at ``values``: they are kept on it, too, until a sampler
                begins.

        Raises:
            TypeError, ValueError: As :func:`~lightning_lpsgld.ops.encode`.
        """
        return cls(CodeCell.of(values.detach(), fmt, finer), dtype=values.dtype)

    # --------------------------------------------------------------------------------------------------------- facts

    @property
    def format(self) -> NumberFormat:
        """The grid on which the values lie."""
        return self._cell.format

    @property
    def cell(self) -> CodeCell:
        """The codes, shared with all views."""
        return self._cell

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the codes in their own order, and no view or cast."""
        mine = (self.size(), self.stride(), self.storage_offset())
        return self._seen is None and mine == (self._cell.stored.shape, self._cell.stored.stride, 0)

    @property
    def nbytes_stored(self) -> int:
        """Bytes of codes and exponents together."""
        return self._cell.stored.nbytes

    def encoded(self) -> Encoded:
        """Codes and exponents, sharing memory; codes of fewer than 8 bits, which lie side by side, as a copy.

        Raises:
            ValueError: If this is a view of a coded tensor.
        """
        return self.stored().encoded()

    def stored(self) -> StoredCodes:
        """Codes and exponents as they lie in memory, which is shared.

        Raises:
            ValueError: If this is a view of a coded tensor.
        """
        if not self.is_whole:
            raise ValueError(f"A view has no codes of its own, got one of shape {tuple(self.shape)}.")
        self._cell.close()
        return self._cell.stored

    def decoded(self) -> Tensor:
        """The values: a new plain tensor, cut off from autograd.

        Raises:
            RuntimeError: If this is a cast of a weight that was changed since.
        """
        cell = self._cell
        if self._seen is not None and self._seen != cell.version:
            raise RuntimeError(
                f"A weight of shape {tuple(cell.stored.shape)} was changed after it was cast to {self.dtype}, and a "
                "cast of codes is made when it is used. Cast it again, or keep its floats: `weight.decoded().to(...)`."
            )
        size, stride, offset = self.size(), self.stride(), int(self.storage_offset())
        if (size, stride, offset) == (cell.stored.shape, cell.stored.stride, 0):
            return cell.values(self.dtype)
        if not cell.divisible or not self.numel():
            return cell.values(self.dtype).as_strided(size, stride, offset)
        last = int(offset + sum((n - 1) * step for n, step in zip(size, stride)))
        start, stop = cell.around(offset, last)
        return cell.values(self.dtype, start, stop).as_strided(size, stride, offset - start * cell.stored.row)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CodedTensor(shape={tuple(self.shape)}, dtype={str(self.dtype)[6:]}, format={self.format})"

    def data_ptr(self) -> int:
        """Address of the codes, which tells weights apart; there are no floats at it."""
        return self._cell.stored.codes.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Storage of the codes."""
        return self._cell.stored.codes.untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array, a copy."""
        return self.decoded().numpy(force=force)

    def tolist(self) -> Any:
        """The values as numbers."""
        return self.decoded().tolist()

    @property
    def data(self) -> Tensor:
        """The same codes without autograd; assigning values rounds them to nearest, assigning a coded tensor shares."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        if not isinstance(values, CodedTensor):
            with torch.no_grad():
                self.copy_(values)
        elif values is not self:
            cell = values.cell
            torch._C.TensorBase.data.__set__(self, values)  # type: ignore[attr-defined]  # device, dtype and geometry
            self._cell, self._seen = cell, None

    # ------------------------------------------------------------------------------------------------- copies, pickles

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            known: Tensor = memo[id(self)]
            return known
        if not self.is_leaf:
            raise RuntimeError("Only tensors that are made by the user can be deep-copied, got a result of autograd.")
        made: Tensor = self.detach().clone() if self.is_whole else self.decoded()
        made.requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, requires_grad=self.requires_grad)
        if self.grad is not None:
            made.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.is_whole:
            return self.decoded().__reduce_ex__(protocol)
        stored = self.stored()
        facts = (str(stored.format), self.dtype, self.requires_grad, isinstance(self, nn.Parameter))
        geometry = (tuple(stored.shape), stored.stride) if stored.packed else ()
        return coded_tensor, (stored.codes, stored.exponents, *facts, *geometry)

    # -------------------------------------------------------------------------------------------------------- dispatch

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            return special(func, *args, **kwargs)
        kind = schemas.kind(func)
        if kind == "view" and isinstance(args[0], CodedTensor):
            return _view(func, *args, **kwargs)
        if kind == "in place" and any(isinstance(x, CodedTensor) for x in schemas.written(func, args, kwargs)):
            return _in_place(func, *args, **kwargs)
        return func(*tree_map_only(CodedTensor, plain, args), **tree_map_only(CodedTensor, plain, kwargs))


def plain(x: Tensor) -> Tensor:
    """``x`` with floats: its values if it is coded, cut off from autograd; else itself."""
    return x.decoded() if isinstance(x, CodedTensor) else x


def coded_tensor(
    codes: Tensor,
    exponents: Tensor | None,
    fmt: str,
    dtype: torch.dtype,
    requires_grad: bool,
    is_parameter: bool,
    shape: tuple[int, ...] | None = None,
    stride: tuple[int, ...] = (),
) -> Tensor:
    """Make a coded tensor of what was saved of one; ``shape`` and ``stride`` are those of packed codes.

    Earlier versions saved codes of fewer than 8 bits a byte each, in the shape of the tensor.

    Raises:
        ValueError: If packed codes are none of such a tensor.
    """
    number = parse_format(fmt)
    if shape is None:
        cell = CodeCell(Encoded(codes, exponents, number))
    else:
        cell = CodeCell(StoredCodes.loaded(codes, exponents, number, shape, stride))
    made: Tensor = CodedTensor(cell, dtype=dtype)
    return nn.Parameter(made, requires_grad=requires_grad) if is_parameter else made.requires_grad_(requires_grad)


torch.serialization.add_safe_globals([coded_tensor])


@contextmanager
def initialization() -> Iterator[None]:
    """Within this, coded tensors may be changed in place by any operations, as initializers do.

    What is done to one tensor is rounded once, to nearest, when the next one is changed or the block ends: the floats
    of one tensor exist at a time.
    """
    global _opened
    if _opened is not None:
        yield
        return
    _opened = []
    try:
        yield
    finally:
        cells, _opened = _opened, None
        for cell in cells:
            cell.close()


def _meta(x: CodedTensor) -> Tensor:
    """A tensor without memory that has the geometry of ``x`` within all of the codes."""
    whole = torch.empty(x.cell.stored.shape.numel(), dtype=x.dtype, device="meta")
    return whole.as_strided(x.size(), x.stride(), x.storage_offset())


def _view(func: Any, x: CodedTensor, *args: Any, **kwargs: Any) -> Any:
    found = func(_meta(x), *args, **kwargs)
    first = found if isinstance(found, Tensor) else next(iter(found), None)
    if first is not None and first.dtype != x.dtype:  # other bits, such as view(torch.int32)
        return func(x.decoded(), *args, **kwargs)

    def coded(meta: Tensor) -> CodedTensor:
        return CodedTensor(x.cell, meta.size(), meta.stride(), int(meta.storage_offset()), x.dtype, x._seen)

    return tree_map_only(Tensor, coded, found)


def _in_place(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, CodedTensor) or (func not in _SETTERS and _opened is None) or x._seen is not None:
        raise TypeError(
            f"{func} would change a weight that is held as codes, and rounding would lose most of it. A sampler with "
            "storage='codes' moves such weights; set them with `copy_`, or make them floats again: "
            "lightning_lpsgld.ops.float_parameters_(module)."
        )
    rest, named = tree_map_only(CodedTensor, plain, args), tree_map_only(CodedTensor, plain, kwargs)
    cell, geometry = x.cell, (x.size(), x.stride(), x.storage_offset())
    if _opened is not None:
        if cell not in _opened:
            for other in _opened:
                other.close()
            _opened[:] = [cell]
        func(cell.opened(x.dtype).as_strided(*geometry), *rest, **named)
        return x
    if x.is_whole:
        values = cell.stored.empty(x.dtype)
        func(values, *rest, **named)
    else:
        values = cell.values(x.dtype)
        func(values.as_strided(*geometry), *rest, **named)
    cell.set(values)
    return x


def _detach(func: Any, x: CodedTensor) -> CodedTensor:
    return CodedTensor(x.cell, x.size(), x.stride(), int(x.storage_offset()), x.dtype, x._seen)


def _clone(func: Any, x: CodedTensor, *, memory_format: Any = None) -> Tensor:
    keeps = memory_format in (None, torch.preserve_format) or x.is_contiguous(memory_format=memory_format)
    if x.is_whole and keeps:
        return CodedTensor(x.cell.copied(), dtype=x.dtype)
    return func(x.decoded(), memory_format=memory_format)


def _copy_(func: Any, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(x, CodedTensor):
        return func(x, plain(source), non_blocking)
    same = isinstance(source, CodedTensor) and source.format == x.format and source.shape == x.shape
    if isinstance(source, CodedTensor) and same and x.is_whole and source.is_whole and _opened is None:
        x.cell.take(source.stored())
        return x
    return _in_place(func, x, source, non_blocking)


def _to_copy(func: Any, x: CodedTensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
    """A move is coded; so is a cast that loses nothing, made anew at each use, as casts of weights live in a graph."""
    target = x.dtype if dtype is None else dtype
    if device is not None and torch.device(device) != x.device and x.is_whole:
        return CodedTensor(x.cell.copied(torch.device(device)), dtype=target)
    out = func(_meta(x), dtype=target, device="meta", **kwargs)
    dense = out.stride() == x.stride()
    same_place = device is None or torch.device(device) == x.device
    if dense and same_place and target != x.dtype and _holds(target, x.format):
        seen = x.cell.version if x._seen is None else x._seen
        return CodedTensor(x.cell, x.size(), x.stride(), int(x.storage_offset()), target, seen)
    return func(x.decoded(), dtype=dtype, device=device, **kwargs)


@cache
def _holds(dtype: torch.dtype, fmt: NumberFormat) -> bool:
    try:
        check_dtype(fmt, dtype)
    except (TypeError, ValueError):
        return False
    return True


def _embedding(func: Any, weight: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Only the rows that are looked up are decoded."""
    by_row = isinstance(weight, CodedTensor) and weight.is_whole and weight.cell.divisible and weight.numel()
    if not isinstance(weight, CodedTensor) or not by_row:
        return func(plain(weight), plain(indices), *args, **kwargs)
    rows = weight.stored().looked_up(indices.reshape(-1))
    return decode(rows, weight.dtype).view(*indices.shape, weight.shape[1])


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.clone.default: _clone,
    aten.copy_.default: _copy_,
    aten._to_copy.default: _to_copy,
    aten.embedding.default: _embedding,
}
