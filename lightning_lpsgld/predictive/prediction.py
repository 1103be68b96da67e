"""What an ensemble says about a batch: mean, parts of its uncertainty, sets or intervals of a calibrated coverage."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

# Not frozen: Lightning moves what `predict_step` returns to the CPU field by field, and refuses frozen dataclasses.

__all__ = ["ClassPrediction", "Prediction", "RegressionPrediction"]


@dataclass
class Prediction:
    """What :class:`.ClassPrediction` and :class:`.RegressionPrediction` share.

    Attributes:
        mean: Mean probabilities, or mean of the outputs.
    """

    mean: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All that is known, by name; what was not asked for is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __len__(self) -> int:
        return len(self.mean)


@dataclass
class ClassPrediction(Prediction):
    r"""Prediction of a classifier; entropies are in nats.

    Attributes:
        mean: Mean probabilities, shape ``(n, classes, ...)``; of a multilabel task ``(n, labels)``.
        predictive_entropy: Total uncertainty :math:`H[\bar p]`, shape ``(n, ...)``; multilabel ``(n, labels)``.
        expected_entropy: Aleatoric part :math:`\frac1K\sum_s H[p_s]`, same shape.
        mutual_information: Epistemic part, their difference, not below 0, same shape.
        sets: Prediction sets, bool ``(n, classes)``; ``None`` where the ensemble is not calibrated.
    """

    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    sets: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """Most probable class of each point, shape ``(n, ...)``."""
        return self.mean.argmax(1)

    @property
    def confidence(self) -> Tensor:
        """Probability of the most probable class, shape ``(n, ...)``."""
        return self.mean.amax(1)


@dataclass
class RegressionPrediction(Prediction):
    r"""Prediction of a regression; variances are in squared units of the targets.

    Attributes:
        mean: :math:`\bar\mu = \frac1K\sum_s \mu_s`, shape ``(n, ...)``.
        epistemic: Variance of the members' means, :math:`\frac1K\sum_s (\mu_s - \bar\mu)^2`, same shape.
        aleatoric: Mean of the members' variances, same shape.
        lower: Lower ends of the calibrated intervals, same shape; ``None`` where the ensemble is not calibrated.
        upper: Their upper ends.
    """

    epistemic: Tensor
    aleatoric: Tensor
    lower: Tensor | None = None
    upper: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """Total variance: epistemic and aleatoric part together (law of total variance)."""
        return self.epistemic + self.aleatoric
