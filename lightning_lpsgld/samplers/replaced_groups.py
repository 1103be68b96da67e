"""Parameter groups that somebody put in place of a sampler's own, as Lightning's finetuning does on resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["adopt_groups"]


def adopt_groups(sampler: Any, held: list[dict[str, Any]]) -> None:
    """Take over what was assigned to ``sampler.param_groups``, and go on with the list and the groups it had.

    Others hold that list and these groups: the optimizer that LR schedulers look at, and a companion. A group with the
    parameters of one that is there changes that one in place, its counters excepted; one with others is added by
    ``add_param_group``; a group that the new list lacks is dropped.

    Args:
        sampler: A ``LangevinOptimizer``.
        held: The list that it had; nothing is done where it still has it.
    """
    if sampler.param_groups is held:
        return
    replaced, sampler.param_groups = sampler.param_groups, held
    found = [_counterpart(group, number, held) for number, group in enumerate(replaced)]
    kept = [group for group in held if any(group is other for other in found)]
    held[:] = kept
    if sampler.companion is not None:
        theirs = sampler.companion.optimizer.param_groups
        theirs[:] = [group for group in theirs if any(group is other for other in kept)]
    for group, mine in zip(replaced, found):
        if mine is None:
            sampler.add_param_group(dict(group))
        else:
            counters = {name: mine[name] for name in sampler.group_counters if name in mine}
            mine.update({**{name: value for name, value in group.items() if name != "params"}, **counters})


def _counterpart(group: Mapping[str, Any], number: int, held: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The group with the same parameters; of several (empty ones) the one at the same place."""
    wanted = [id(param) for param in group["params"]]
    same = [other for other in held if [id(param) for param in other["params"]] == wanted]
    at_place = number < len(held) and any(held[number] is other for other in same)
    return held[number] if at_place else same[0] if same else None
