"""Which casts give the network's output: found from what the outermost forward returns, not from names or order.

The first forward of each outermost module casts everything and holds, beside each result that nothing has used before
the next cast, the tensor that would stand there without the cast. What is among the module's outputs at the end is
replaced by it, and the places are remembered: later forwards do not cast there. Results and draws are the same from the
first forward on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, is_tensor

from lightning_lpsgld.casting.storage import StorageTag, storage_pointer

__all__ = ["Held", "OpenEnd", "OpenEnds", "OutputTracker", "Place", "replace_tensors", "tensors_in"]

#: One cast of a forward call: (outermost module, site, how often the site was reached before in this call).
Place = tuple[str, str, int]


def tensors_in(structure: Any) -> list[Tensor]:
    """Tensors in nested tuples, lists and mappings."""
    if is_tensor(structure):
        return [structure]
    if isinstance(structure, Mapping):
        structure = list(structure.values())
    if isinstance(structure, (tuple, list)):
        return [x for part in structure for x in tensors_in(part)]
    return []


def replace_tensors(structure: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    """The structure with ``swap`` applied to its tensors; the same object where nothing changed.

    Mappings that can be written to are changed in place, so that special classes survive.
    """
    if is_tensor(structure):
        return swap(structure)
    if isinstance(structure, Mapping):
        for key, part in list(structure.items()):
            new = replace_tensors(part, swap)
            if new is not part and isinstance(structure, MutableMapping):
                structure[key] = new
        return structure
    if isinstance(structure, (tuple, list)):
        parts = [replace_tensors(part, swap) for part in structure]
        if all(new is old for new, old in zip(parts, structure)):
            return structure
        return type(structure)(*parts) if hasattr(structure, "_fields") else type(structure)(parts)
    return structure


@dataclass
class Held:
    """A cast result, the tensor that would stand in its place uncast, and the casts between the two."""

    tag: StorageTag
    uncast: Tensor
    places: tuple[Place, ...]
    used: bool = False

    def uncast_view(self, x: Tensor) -> Tensor | None:
        """View of the uncast tensor with the geometry of ``x``, a view of the cast one; ``None`` if there is none."""
        if self.tag.is_whole(x):
            return self.uncast
        if self.uncast.stride() != self.tag.stride:
            return None
        shift = self.uncast.storage_offset() - self.tag.offset
        return self.uncast.as_strided(x.size(), x.stride(), x.storage_offset() + shift)


class OutputTracker:
    """Learns, per outermost module and mode, the places whose result is the network's output."""

    def __init__(self) -> None:
        self.places: set[Place] = set()
        self.learned: set[tuple[str, bool]] = set()
        self._held: dict[int, Held] = {}

    def hold(self, out: Tensor, uncast: Tensor, places: tuple[Place, ...]) -> None:
        """Remember ``uncast`` in case ``out`` turns out to be the network's output."""
        self._held[storage_pointer(out)] = Held(StorageTag(out), uncast, places)

    def find(self, x: Any) -> Held | None:
        """What is held for ``x`` or the tensor that it is a view of."""
        held = self._held.get(storage_pointer(x)) if is_tensor(x) else None
        return held if held is not None and held.tag.holds(x) else None

    def consume(self, arguments: Any, result: Any = None) -> None:
        """Mark the arguments of an operation as used, unless its result is a view of them."""
        kept = {storage_pointer(x) for x in tensors_in(result)}
        for x in tensors_in(arguments):
            held = self._held.get(storage_pointer(x))
            if held is not None and storage_pointer(x) not in kept:
                held.used = True

    def advance(self) -> None:
        """Let go of what has been used: another cast follows, so it was inside the network (or only looked at)."""
        self._held = {pointer: held for pointer, held in self._held.items() if not held.used}

    def finish(self, owner: str, training: bool, output: Any, on_output: Callable[[Tensor, Tensor], None]) -> Any:
        """Output of the outermost module without the casts on it; their places are learned.

        ``on_output`` is called with each uncast tensor and the cast one that it replaces.
        """

        def swap(x: Tensor) -> Tensor:
            held = self.find(x)
            uncast = None if held is None else held.uncast_view(x)
            if held is None or uncast is None:
                return x
            self.places.update(held.places)
            on_output(uncast, x)
            return uncast

        output = replace_tensors(output, swap)
        self._held.clear()
        self.learned.add((owner, training))
        return output

    def is_output(self, site: str) -> bool:
        """Whether a site gives a network's output on any visit."""
        return any(site == name for _, name, _ in self.places)

    def drop(self) -> None:
        """Forget the tensors held."""
        self._held.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as lists."""
        return {"places": sorted(map(list, self.places)), "learned": sorted(map(list, self.learned))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was learned."""
        self.places = {(str(owner), str(site), int(times)) for owner, site, times in state["places"]}
        self.learned = {(str(owner), bool(training)) for owner, training in state["learned"]}


@dataclass
class OpenEnd:
    """An output of a network that was left uncast, and how to cast it if it goes into another network after all."""

    tag: StorageTag
    cast: Callable[[], Tensor]


class OpenEnds:
    """Uncast outputs of the outermost modules called so far in one context."""

    def __init__(self) -> None:
        self._ends: dict[int, OpenEnd] = {}

    def add(self, x: Tensor, cast: Callable[[], Tensor]) -> None:
        """Note that ``x`` was left uncast, and how it would be cast."""
        self._ends[storage_pointer(x)] = OpenEnd(StorageTag(x), cast)

    def note(self, x: Tensor, value: Tensor) -> None:
        """Note that ``x`` was left uncast although ``value``, its cast, is known."""
        self.add(x, lambda: value)

    def find(self, x: Any) -> OpenEnd | None:
        """The end that ``x`` is, or is a view of."""
        if not self._ends or not is_tensor(x):
            return None
        end = self._ends.get(storage_pointer(x))
        return end if end is not None and end.tag.holds(x) else None

    def joined(self, x: Tensor) -> Tensor:
        """``x`` cast, if it is an open end; else ``x``."""
        end = self.find(x)
        if end is None:
            return x
        value = end.cast()
        if end.tag.is_whole(x):
            return value
        if value.stride() != end.tag.stride:
            return x
        return value.as_strided(x.size(), x.stride(), x.storage_offset() - end.tag.offset + value.storage_offset())

    def clear(self) -> None:
        """Forget all."""
        self._ends.clear()
