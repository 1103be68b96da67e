"""Scalar quantities of posterior samples, from which convergence is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank import Sample, SampleBank
from lightning_lpsgld.predictive.swap import swapped_weights
from lightning_lpsgld.random import DrawKey, Role, stream_id, words

__all__ = ["chain_draws", "weight_probes"]

#: Elements of a tensor that a projection looks at; evenly spaced ones of larger tensors.
_PROJECTED = 2**14


def _floating(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [t.detach().double().flatten() for t in tensors.values() if t.is_floating_point() and t.numel()]


def weight_probes(tensors: Mapping[str, Tensor], *, projections: int = 4, seed: int = 0) -> dict[str, float]:
    r"""Norm and random projections of a set of weights.

    .. math::
        \text{projection}_j = \frac{1}{\sqrt d} \sum_i s_{ij} w_i, \qquad s_{ij} = \pm 1

    with signs that are a function of ``seed``, j and i only, so that every chain and every run is projected alike.

    Args:
        tensors: Weights by name, in the module's order; others than floating ones are passed over.
        projections: Number of random projections.
        seed: Seed of the signs.

    Returns:
        ``"norm"`` and ``"projection0"``, ``"projection1"``, ...

    Example:
        >>> weight_probes({"w": torch.tensor([3.0, 4.0])}, projections=0)
        {'norm': 5.0}
    """
    flat = _floating(tensors)
    probes = {"norm": float(sum((t.square().sum() for t in flat), torch.zeros((), dtype=torch.float64)).sqrt())}
    some = [t[:: max(1, t.numel() // _PROJECTED)] for t in flat]
    weights = torch.cat([t.cpu() for t in some]) if some else torch.zeros(0, dtype=torch.float64)
    for j in range(projections):
        signs = words(weights.shape, DrawKey(seed, stream=stream_id(Role.PROBE, j))) >> 31
        probes[f"projection{j}"] = float(((2 * signs - 1) * weights).sum()) / max(len(weights), 1) ** 0.5
    return probes


def chain_draws(
    bank: SampleBank,
    *,
    module: nn.Module | None = None,
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    projections: int = 4,
    seed: int = 0,
    cache: dict[tuple[int, int], dict[str, float]] | None = None,
) -> dict[str, Tensor]:
    """Probe quantities of all samples of a bank, chain by chain; of their weights, what is frozen left out.

    Args:
        bank: The samples.
        module: Built like the one that was sampled; each sample is loaded into it for ``measure``, and its weights are
            put back afterwards.
        measure: Gives further quantities by name, e.g. a held-out loss or logits of some test points.
        projections: As for :func:`weight_probes`.
        seed: As for :func:`weight_probes`.
        cache: Values by (chain, step), read and filled, so that a growing bank is read once.

    Returns:
        float64 tensors of shape ``(chains, draws)`` by name. Chains are cut to the length of the shortest; their
        earliest draws are left out.

    Raises:
        ValueError: If the bank is empty, or there is ``measure`` without ``module``.
    """
    if measure is not None and module is None:
        raise ValueError("chain_draws: `measure` needs the `module` to load samples into.")
    if not len(bank):
        raise ValueError(f"chain_draws: {bank!r} has no sample to look at.")
    found = {} if cache is None else cache
    chains: dict[int, list[tuple[int, dict[str, float]]]] = {}
    for number, info in enumerate(bank.infos):
        place = (info.chain, info.step)
        if place not in found:
            found[place] = _probe(bank.sample(number), module, measure, projections, seed)
        chains.setdefault(info.chain, []).append((info.step, found[place]))
    shortest = min(map(len, chains.values()))
    rows = [
        [values for _, values in sorted(chains[chain], key=lambda draw: draw[0])[-shortest:]]
        for chain in sorted(chains)
    ]
    return {name: torch.tensor([[v[name] for v in row] for row in rows], dtype=torch.float64) for name in rows[0][0]}


def _probe(
    sample: Sample,
    module: nn.Module | None,
    measure: Callable[[nn.Module], Mapping[str, float]] | None,
    projections: int,
    seed: int,
) -> dict[str, float]:
    probes = weight_probes(sample.state_dict(base=False), projections=projections, seed=seed)
    if module is None or measure is None:
        return probes
    with swapped_weights(module), torch.no_grad():
        sample.load_into(module)
        module.eval()
        return {**probes, **{name: float(value) for name, value in measure(module).items()}}
