"""Probabilities and logits are told apart by their values: a mistaken softmax changes every score without a word."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["refuse_logits", "refuse_probabilities", "rows_of_probabilities", "warn_of_sigmoids"]

#: Sums of rows may be off by this much, as rounding of probabilities to bfloat16 makes them.
_TOLERANCE = 0.01
#: Rows that are taken for probabilities add up to one this closely (in float32 and finer).
_EXACT = 1e-4
#: With fewer rows a coincidence is not ruled out.
_ENOUGH = 4
#: One logit a point may lie in [0, 1] by chance; with so many points a warning is due.
_MANY = 32


def refuse_logits(probabilities: Tensor) -> None:
    """Raise if rows are no probabilities. Looks at the values, which waits for an accelerator; NaN is let through.

    Args:
        probabilities: Shape ``(n, classes)``, or ``(n,)`` if they are single ones; floating.

    Raises:
        ValueError: If a value is negative, or a row's sum (a single value) is not 1 (not at most 1) within 0.01.

    Example:
        >>> refuse_logits(torch.tensor([[0.25, 0.75]]))
    """
    if torch.compiler.is_compiling() or not probabilities.numel():
        return
    wide = probabilities.detach()
    rows = wide if wide.ndim > 1 else wide[:, None]
    sums = rows.sum(1, dtype=torch.float64)
    off = (sums > 1.0 + _TOLERANCE) | (rows < -1e-6).any(1)
    if wide.ndim > 1:
        off = off | (sums < 1.0 - _TOLERANCE)
    if bool(off.any()):
        row = int(off.nonzero()[0, 0])
        raise ValueError(
            "`probabilities` must be rows of values >= 0 that sum to 1, got a row "
            f"(number {row}) with the smallest value {float(rows[row].min()):.4g} and the sum {float(sums[row]):.4g}: "
            "logits? Pass logits.softmax(dim=1); of one logit z a point, torch.stack([sigmoid(-z), sigmoid(z)], dim=1)."
        )


def rows_of_probabilities(x: Tensor) -> bool:
    """Whether all rows are probability vectors, so many and so exactly that it is no coincidence.

    Args:
        x: Shape ``(n, classes)``, floating.

    Returns:
        ``False`` for fewer than 4 rows, whatever they hold.

    Example:
        >>> rows_of_probabilities(torch.randn(8, 3)), rows_of_probabilities(torch.randn(8, 3).softmax(1))
        (False, True)
    """
    if torch.compiler.is_compiling() or x.ndim != 2 or len(x) < _ENOUGH or x.shape[1] < 2:
        return False
    wide = x.detach()
    exact = _EXACT if torch.finfo(wide.dtype).bits >= 32 else _TOLERANCE
    return bool((((wide.sum(1, dtype=torch.float64) - 1.0).abs() < exact) & (wide >= 0).all(1)).all())


def refuse_probabilities(logits: Tensor) -> None:
    """Raise if all rows of what is taken for logits are probability vectors.

    Args:
        logits: Shape ``(n, classes)``, floating. Log-probabilities are logits.

    Raises:
        ValueError: If they are; with fewer than 4 rows never.

    Example:
        >>> refuse_probabilities(torch.randn(8, 3).log_softmax(1))
    """
    if rows_of_probabilities(logits):
        raise ValueError(
            f"Logits are expected, got probabilities: all {len(logits)} rows of {logits.shape[1]} values are >= 0 and "
            "sum to 1, and a second softmax would flatten them. Give what the module computes before its softmax, or "
            "its logarithm: logits=lambda module, batch: module(batch[0]).log()."
        )


def warn_of_sigmoids(logits: Tensor, task: str) -> None:
    """Warn if what is taken for logits of single points (32 at least) lies in [0, 1] altogether.

    Unlike rows of probabilities, such logits are possible, so this is no error.

    Args:
        logits: Any shape, floating.
        task: Named in the warning.

    Example:
        >>> warn_of_sigmoids(torch.linspace(-1, 1, 50), "binary")
    """
    if torch.compiler.is_compiling() or logits.numel() < _MANY:
        return
    low, high = (float(end) for end in logits.detach().aminmax())
    if low >= 0.0 and high <= 1.0:
        warnings.warn(
            f"task={task!r} expects logits, and all {logits.numel()} of this batch lie in [0, 1], like probabilities. "
            "If the module ends in a sigmoid, give what it computes before, or torch.logit of it.",
            stacklevel=2,
        )
