"""The theory as tools: exact laws of low-precision chains, distances, budgets, gradient shrinkage, a planner."""

from lightning_lpsgld.analysis.distance import best_on_grid, gibbs_on_grid, moments, variance_ratio, wasserstein2
from lightning_lpsgld.analysis.onestep import lattice_law, naive_law, vc_law
from lightning_lpsgld.analysis.stationary import stationary_law, stationary_of, transition_matrix

__all__ = [
    "best_on_grid",
    "gibbs_on_grid",
    "lattice_law",
    "moments",
    "naive_law",
    "stationary_law",
    "stationary_of",
    "transition_matrix",
    "variance_ratio",
    "vc_law",
    "wasserstein2",
]
