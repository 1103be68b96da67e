"""Stochastic variance-reduced gradient, and its low-precision form LP-SVRG."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_lpsgld.formats import FormatLike, NumberFormat, check_dtype, parse_format
from lightning_lpsgld.samplers.first_rounding import frozen_off_grid, round_to_nearest_
from lightning_lpsgld.samplers.options import CentredOptions
from lightning_lpsgld.samplers.updates import langevin_steps_
from lightning_lpsgld.samplers.variance_reduced import VarianceReduced

__all__ = ["SVRG"]


class SVRG(VarianceReduced):
    r"""SVRG; with a weight format LP-SVRG; with a temperature (low-precision) SVRG-Langevin.

    .. math::
        w \leftarrow Q^{vc}\!\left(w - \eta\,[\nabla f_i(w) - \nabla f_i(\tilde w) + \nabla f(\tilde w) + \lambda w],\;
        2\eta T/N\right)

    which at T = 0 is stochastic rounding, and without a format no rounding. On a strongly convex loss the gradient norm
    falls at a linear rate to zero; with a fixed-point format it stalls at a floor proportional to the squared gap.

    Args:
        params: Iterable of parameters or of parameter groups.
        lr: Step size η >= 0 per batch-mean loss.
        weight_format: Grid of the weights; ``None``: not rounded.
        options: See :class:`~lightning_lpsgld.samplers.options.CentredOptions`.

    State (all in ``state_dict``): per group ``step``, ``inner``, ``seed``, ``temperature``; per parameter ``centre``
    and ``full_gradient``.

    Raises:
        ValueError: If an argument is out of range, or a format is wider than a parameter's dtype.

    Example:
        >>> import torch
        >>> w, x = torch.nn.Parameter(torch.zeros(())), torch.tensor([1.0, 5.0])
        >>> opt = SVRG([w], lr=0.5)
        >>> def closure(i):
        ...     opt.zero_grad()
        ...     loss = (w - x[i]).square().mean() / 2
        ...     loss.backward()
        ...     return loss
        >>> _ = opt.recentre(lambda: closure([0, 1]))
        >>> for i in range(20):
        ...     loss = opt.step(lambda: closure([i % 2]))
        >>> bool((w - 3).abs() < 1e-4)
        True

    Reference:
        Johnson & Zhang, 2013, "Accelerating stochastic gradient descent using predictive variance reduction";
        De Sa et al., 2018, arXiv:1803.03383 (LP-SVRG); Dubey et al., 2016 (SVRG-LD).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        weight_format: FormatLike | None = None,
        **options: Unpack[CentredOptions],
    ) -> None:
        self.weight_format: NumberFormat | None = None if weight_format is None else parse_format(weight_format)
        self._frozen: set[Tensor] = set()
        super().__init__(params, {}, lr=lr, **options)
        for param in self._indices:
            fmt = self.format_of(param)
            if fmt is not None:
                check_dtype(fmt, param.dtype)

    def format_of(self, param: Tensor) -> NumberFormat | None:
        """Grid on which a parameter lies, ``None`` where it is not rounded; see :meth:`.grid.GridSampler.format_of`."""
        return None if param in self.full_precision or param in self._frozen else self.weight_format

    @property
    def formats(self) -> dict[str, str]:
        """Role of each rounded quantity and its format, for display."""
        pairs = {"weights": self.weight_format, "gradients": self.gradient_format}
        return {role: str(fmt) for role, fmt in pairs.items() if fmt is not None}

    @torch.no_grad()
    def round_parameters_(self) -> None:
        """As :meth:`.grid.GridSampler.round_parameters_`; frozen weights are left as they are here, too."""
        if self.weight_format is not None:
            params = [param for param in self._indices if param not in self.full_precision]
            self._frozen = frozen_off_grid(params, self.weight_format)
            round_to_nearest_(params, self.weight_format, self.name_of)

    def _with_gradients(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        params, grads = super()._with_gradients(group)
        self._frozen.difference_update(params)
        return params, grads

    def point_of(self, param: Tensor) -> Tensor:
        """The parameter itself."""
        return param.detach()

    def place_centre(self, params: list[tuple[dict[str, Any], Tensor]]) -> None:
        """Nothing to do: the parameters are the point."""

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Move the parameters of a group along their corrected gradients."""
        for fmt in {self.format_of(p) for p in params}:
            chosen = [i for i, p in enumerate(params) if self.format_of(p) == fmt]
            some = [params[i] for i in chosen]
            spec = self.spec(group, fmt, exempt=fmt is None and self.weight_format is not None)
            counts = langevin_steps_(
                some, [grads[i] for i in chosen], None, spec, [self.key(group)] * len(some),
                [self.index_of(p) for p in some], backend=self.backend,
            )  # fmt: skip
            self.saturated.extend(zip(some, counts))
