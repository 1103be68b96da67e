"""The user's own optimizer beside a sampler: it moves what is trained and not sampled, in the same steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Companion", "sampled_among"]


def sampled_among(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those parameter groups that a sampler moves itself."""
    return [group for group in groups if not group.get("trained")]


class Companion:
    """An optimizer that keeps its groups and steps with a sampler.

    Its groups stay the same objects, marked ``"trained"``; the sampler holds them too, so that whoever clips, zeroes or
    saves reaches both parts.

    Args:
        optimizer: The optimizer.
        followed: Groups of the sampler, each with the one of the optimizer whose learning rate it follows.
        chosen: Parameters to sample, with their weight decay, also of groups that will be added.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        followed: Sequence[tuple[dict[str, Any], dict[str, Any]]],
        chosen: Mapping[Tensor, float | None],
    ) -> None:
        self.optimizer = optimizer
        self._followed = followed
        self._chosen = chosen
        for group in optimizer.param_groups:
            group["trained"] = True

    def follow(self) -> None:
        """Give the sampler's groups the learning rates of those they follow."""
        for mine, source in self._followed:
            mine["lr"] = source["lr"]

    def share(self, param_group: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Take the parameters of a new group that are not to be sampled.

        Returns:
            The group with what is left for the sampler, and the groups that the optimizer got.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        rest = [p for p in params if p not in self._chosen]
        added = []
        if rest:
            self.optimizer.add_param_group({**param_group, "params": rest})
            added = self.optimizer.param_groups[-1:]
            added[0]["trained"] = True
        return {**param_group, "params": [p for p in params if p in self._chosen]}, added
