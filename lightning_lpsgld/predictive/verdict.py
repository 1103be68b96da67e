"""Whether the samples of an ensemble differ enough to be worth averaging, in words."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["diversity_verdict"]

#: Below this share of a single sample's loss (or of the predictive variance) averaging is not worth its cost.
_WORTHWHILE = 0.01
#: Where two samples differ on more points than this they are not alike, whatever the average gains.
_ALIKE = 0.05

_REMEDY = (
    "Let them drift further apart: more steps between samples (SampleCollector(every=...)), a larger learning rate or "
    "temperature, cyclical steps, or several chains."
)


def diversity_verdict(scores: Mapping[str, float], single_nll: float) -> str | None:
    """Say that samples are too alike, by what averaging them gains, and what to change.

    Classes: the ambiguity (mean NLL of the samples minus NLL of the ensemble) is below 1 % of a single sample's NLL,
    and two samples disagree on fewer than 5 % of the points.
    Numbers: the variance between the samples' means is below 1 % of the predictive variance.

    Args:
        scores: Scores of the ensemble with ``size``, ``ambiguity``, and ``disagreement`` or ``epistemic`` and
            ``aleatoric``.
        single_nll: Mean NLL of the samples, each alone.

    Returns:
        A sentence or two; ``None`` where there is nothing to say (also for fewer than two samples).

    Example:
        >>> scores = {"size": 8, "ambiguity": 0.001, "disagreement": 0.004}
        >>> diversity_verdict(scores, 0.4)[:58]
        'The 8 samples are too alike to be worth averaging: the ens'
        >>> diversity_verdict({**scores, "ambiguity": 0.05}, 0.4) is None
        True
    """
    size, gain = int(scores["size"]), scores["ambiguity"]
    if size < 2:
        return None
    if "epistemic" in scores:
        total = scores["epistemic"] + scores["aleatoric"]
        if not scores["epistemic"] < _WORTHWHILE * total:
            return None
        reason = f"their means differ by a variance of {scores['epistemic']:.2g}, of {total:.3g} in all"
    else:
        disagreement = scores.get("disagreement", 0.0)
        if not (gain < _WORTHWHILE * single_nll and disagreement < _ALIKE):
            return None
        reason = (
            f"the ensemble's NLL is {gain:.2g} nats below the {single_nll:.3g} of a single one, and two of them "
            f"disagree on {disagreement:.1%} of the points"
        )
    return f"The {size} samples are too alike to be worth averaging: {reason}. {_REMEDY}"
