"""A sampler in one file, written against the contract in ``LangevinOptimizer``'s docstring and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.formats import FormatLike, parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.random import Role, normals, stream_id
from lightning_lpsgld.samplers import LangevinOptimizer


class FloatToy(LangevinOptimizer):
    """Langevin steps along an exponential average of the gradients; knows no formats."""

    def __init__(
        self, params: Any, lr: float, *, num_data: int, temperature: float = 1.0, weight_decay: float = 0.0,
        seed: int = 0, memory: float = 0.5, **options: Any,
    ) -> None:  # fmt: skip
        self.memory = memory
        defaults = {"lr": lr, "weight_decay": weight_decay, "temperature": temperature, "seed": seed}
        super().__init__(params, defaults, num_data=num_data, **options)

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        for param, grad in zip(params, grads):
            mean = self.state[param].setdefault("mean", torch.zeros_like(grad))
            mean.mul_(self.memory).add_(grad, alpha=1 - self.memory)
            drift = mean + group["weight_decay"] * param
            noise = normals(param.shape, self.key(group).at(stream=stream_id(Role.WEIGHT, self.index_of(param))))
            param.copy_(self.rounded(param - self.step_size(group) * drift + self.noise_variance(group) ** 0.5 * noise))

    def rounded(self, value: Tensor) -> Tensor:
        return value


class GridToy(FloatToy):
    """The same, its weights rounded to nearest on a grid."""

    def __init__(self, params: Any, lr: float, *, weight_format: FormatLike | None = None, **options: Any) -> None:
        self.weight_format = None if weight_format is None else parse_format(weight_format)
        super().__init__(params, lr, **options)

    @property
    def formats(self) -> dict[str, str]:
        return {} if self.weight_format is None else {"weights": str(self.weight_format)}

    def format_of(self, param: Tensor) -> Any:
        return self.weight_format

    def rounded(self, value: Tensor) -> Tensor:
        return value if self.weight_format is None else quantize(value, self.weight_format, rounding="nearest")

    @torch.no_grad()
    def round_parameters_(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.copy_(self.rounded(param))
