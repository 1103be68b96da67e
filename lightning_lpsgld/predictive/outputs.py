"""What a module gave: logits, a mean, or a mean with its variance, whatever they came wrapped in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

__all__ = ["GaussianOutput", "OutputForm", "read_output"]

#: How a module gives a real prediction: ``"auto"`` takes a bare tensor for the mean and reads names where there are
#: some; a pair, or a tensor whose dim 1 holds both halves, needs one of the others.
OutputForm = Literal["auto", "mean", "mean_variance", "mean_log_variance"]

_MEANS = ("mean", "loc", "mu")
_VARIANCES = ("variance", "var")
_LOG_VARIANCES = ("log_variance", "log_var", "logvar")
_SCALES = ("scale", "std", "sigma")


class GaussianOutput(NamedTuple):
    """Mean and variance of one Gaussian per point, of one shape.

    Attributes:
        mean: Any shape, in the unit of the targets.
        variance: That shape, or one that broadcasts to it; in its square.
    """

    mean: Tensor
    variance: Tensor


def _first(names: Mapping[str, Any], candidates: tuple[str, ...]) -> Any:
    return next((names[name] for name in candidates if isinstance(names.get(name), Tensor)), None)


def _from_names(names: Mapping[str, Any]) -> Tensor | GaussianOutput | None:
    """Logits, a mean, or a Gaussian by the usual names; ``None`` where there are none of them."""
    logits, mean = _first(names, ("logits",)), _first(names, _MEANS)
    if logits is not None or mean is None:
        return logits
    variance, log_variance, scale = (_first(names, group) for group in (_VARIANCES, _LOG_VARIANCES, _SCALES))
    if log_variance is not None:
        variance = log_variance.double().exp()
    elif scale is not None:
        variance = scale.double().square()
    return mean if variance is None else GaussianOutput(mean, variance)


def _from_distribution(output: Distribution) -> Tensor | GaussianOutput:
    inner = output.base_dist if isinstance(output, Independent) else output
    if isinstance(inner, Normal):
        return GaussianOutput(inner.mean, inner.variance)
    if isinstance(inner, Categorical):
        return torch.as_tensor(inner.logits).movedim(-1, 1) if inner.logits.ndim > 1 else inner.logits
    if isinstance(inner, Bernoulli):
        return torch.as_tensor(inner.logits)
    raise TypeError(
        f"A prediction may be a Normal, Categorical or Bernoulli distribution, got {type(output).__name__}. "
        "Give its logits, or its mean and variance, instead."
    )


def _halves(output: Any, form: OutputForm) -> GaussianOutput:
    if isinstance(output, Tensor):
        if output.ndim < 2 or output.shape[1] % 2:
            raise ValueError(
                f"outputs={form!r} takes a pair of tensors, or one whose dim 1 holds means and then as many variances, "
                f"got shape {tuple(output.shape)}."
            )
        output = output.chunk(2, dim=1)
    if not (isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(o, Tensor) for o in output)):
        raise TypeError(f"outputs={form!r} takes a pair of tensors, got {type(output).__name__}.")
    mean, second = output
    return GaussianOutput(mean, second.double().exp() if form == "mean_log_variance" else second)


def read_output(output: Any, form: OutputForm = "auto") -> Any:
    """Logits or mean as a tensor, or a :class:`GaussianOutput`; anything unknown is handed back as it is.

    Understood are tensors, mappings and objects with ``logits`` (as Hugging Face's models give), or with ``mean`` (or
    ``loc``) and perhaps ``variance``, ``log_variance`` or ``scale``, and Normal, Categorical and Bernoulli
    distributions.

    Args:
        output: What the module gave.
        form: How to take a pair of tensors, or one tensor with two halves along dim 1.

    Returns:
        ``Tensor``, :class:`GaussianOutput`, or ``output``.

    Raises:
        TypeError: If ``output`` is a pair and ``form`` does not say of what.
        ValueError: If a tensor has no two halves.

    Example:
        >>> import torch
        >>> read_output({"mean": torch.zeros(1), "log_variance": torch.zeros(1)})
        GaussianOutput(mean=tensor([0.]), variance=tensor([1.], dtype=torch.float64))
    """
    if isinstance(output, GaussianOutput):
        return output
    if isinstance(output, Distribution):
        return _from_distribution(output)
    if not isinstance(output, (Tensor, tuple, list)) or hasattr(output, "_fields"):
        if hasattr(output, "_asdict"):
            names = output._asdict()
        elif isinstance(output, Mapping):
            names = output
        else:
            names = {n: getattr(output, n, None) for n in ("logits", *_MEANS, *_VARIANCES, *_LOG_VARIANCES, *_SCALES)}
        found = _from_names(names)
        return output if found is None else found
    if form in ("mean_variance", "mean_log_variance"):
        return _halves(output, form)
    if isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(part, Tensor) for part in output):
        raise TypeError(
            "A prediction is a pair of tensors, and whether it is (mean, variance), (mean, log variance) or something "
            "else cannot be seen. Pass task=Regression(outputs='mean_variance' or 'mean_log_variance'), or a function "
            "as `logits` that picks what is predicted."
        )
    return output
