"""A prediction as columns of a table: one row a point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.predictive import ClassPrediction, Prediction, RegressionPrediction

__all__ = ["prediction_columns"]


def _wide(name: str, values: Tensor) -> dict[str, list[Any]]:
    """One column for one value a point, numbered ones for several."""
    values = values.detach().cpu()
    values = values.float() if values.is_floating_point() and values.dtype != torch.float64 else values
    if values.ndim == 1:
        return {name: values.tolist()}
    flat = values.flatten(1)
    if flat.shape[1] == 1:
        return {name: flat[:, 0].tolist()}
    return {f"{name}_{i}": flat[:, i].tolist() for i in range(flat.shape[1])}


def prediction_columns(prediction: Prediction | Tensor | dict[str, Tensor]) -> dict[str, list[Any]]:
    """Columns by name, each with one entry a point.

    A classification gives ``label``, ``confidence``, ``probability_0``, ..., the entropies and, when calibrated,
    ``set`` (the classes, separated by spaces); a regression ``mean``, ``epistemic``, ``aleatoric``, ``lower``,
    ``upper`` (numbered for several outputs). A tensor or a mapping of tensors is written as it is.

    Args:
        prediction: What a ``predict_step`` returned.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> prediction_columns(torch.tensor([[0.25, 0.75]]))
        {'output_0': [0.25], 'output_1': [0.75]}
    """
    if isinstance(prediction, ClassPrediction):
        return _class_columns(prediction)
    if isinstance(prediction, RegressionPrediction):
        named = prediction.tensors()
    elif isinstance(prediction, Tensor):
        named = {"output": prediction}
    elif isinstance(prediction, dict) and all(isinstance(value, Tensor) for value in prediction.values()):
        named = prediction
    else:
        raise TypeError(
            f"PredictionWriter: `predict_step` gave {type(prediction).__name__}; it writes predictions of a "
            "PosteriorModule, tensors and mappings of tensors, first dim the points."
        )
    columns: dict[str, list[Any]] = {}
    for name, values in named.items():
        columns |= _wide(name, values)
    return columns


def _class_columns(prediction: ClassPrediction) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    multilabel = prediction.predictive_entropy.shape == prediction.mean.shape
    if not multilabel:
        columns |= _wide("label", prediction.labels) | _wide("confidence", prediction.confidence)
    columns |= _wide("probability", prediction.mean)
    for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
        columns |= _wide(name, getattr(prediction, name))
    if prediction.sets is not None:
        rows = prediction.sets.cpu()
        columns["set"] = [" ".join(map(str, row.nonzero().flatten().tolist())) for row in rows]
    return columns
