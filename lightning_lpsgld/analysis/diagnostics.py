"""Do several chains agree, and how many independent draws are they worth? Split R-hat and effective sample size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["ChainDiagnostic", "chain_diagnostics", "to_inference_data"]


class ChainDiagnostic(NamedTuple):
    """Convergence of one quantity.

    Attributes:
        rhat: Rank-normalized split R-hat; near 1 where chains agree with each other and with themselves.
        ess_bulk: Effective number of independent draws for the centre of the distribution, over all chains.
        ess_tail: The same for its 5 % and 95 % quantiles.
    """

    rhat: float
    ess_bulk: float
    ess_tail: float


def _array_stats() -> Any:
    try:
        from arviz_stats.base import array_stats
    except ImportError as error:
        raise ModuleNotFoundError(
            "chain_diagnostics needs arviz-stats: pip install 'lightning_lpsgld[diagnostics]'."
        ) from error
    return array_stats


def _draws(name: str, values: Tensor | np.ndarray) -> np.ndarray:
    array = torch.as_tensor(values).detach().double().cpu().numpy()
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 4:
        raise ValueError(
            f"chain_diagnostics: `{name}` must have the shape (chains, draws) with at least 4 draws, "
            f"got {tuple(array.shape)}."
        )
    return array


def chain_diagnostics(quantities: Mapping[str, Tensor | np.ndarray]) -> dict[str, ChainDiagnostic]:
    r"""Split R-hat and effective sample sizes of scalar quantities along chains.

    With n draws in each half-chain, B the variance between and W within half-chains of the rank-normalized draws,

    .. math::
        \hat R = \sqrt{\frac{\frac{n-1}{n} W + \frac{1}{n} B}{W}}

    and the larger of this and of the folded draws is taken. A single chain is compared with itself, half against half.

    Args:
        quantities: Draws by name, each of shape ``(chains, draws)``, in the order in which they were made.

    Returns:
        One :class:`ChainDiagnostic` per quantity; NaN where a quantity is constant.

    Raises:
        ValueError: If a shape is wrong or there are fewer than 4 draws.
        ModuleNotFoundError: If arviz-stats is not installed.

    Reference:
        Vehtari et al., 2021, "Rank-normalization, folding, and localization: an improved R-hat", arXiv:1903.08008.
    """
    stats = _array_stats()
    results = {}
    for name, values in quantities.items():
        draws = _draws(name, values)
        if not np.isfinite(draws).all() or np.ptp(draws) == 0:
            results[name] = ChainDiagnostic(float("nan"), float("nan"), float("nan"))
            continue
        results[name] = ChainDiagnostic(
            float(stats.rhat(draws, method="rank")),
            float(stats.ess(draws, method="bulk")),
            float(stats.ess(draws, method="tail", prob=(0.05, 0.95))),
        )
    return results


def to_inference_data(quantities: Mapping[str, Tensor | np.ndarray]) -> Any:
    """The draws as ArviZ holds them: a ``DataTree`` (``InferenceData`` with older ArviZ), group ``posterior``.

    Args:
        quantities: As for :func:`chain_diagnostics`.

    Raises:
        ModuleNotFoundError: If ArviZ is not installed.
    """
    posterior = {name: _draws(name, values) for name, values in quantities.items()}
    try:
        from arviz_base import from_dict
    except ImportError:
        try:
            import arviz
        except ImportError as error:
            raise ModuleNotFoundError("to_inference_data needs ArviZ: pip install arviz-base.") from error
        return arviz.from_dict(posterior=posterior)
    return from_dict({"posterior": posterior})
