"""The theory as tools: exact laws of low-precision chains, distances, budgets, gradient shrinkage, a planner."""

from lightning_lpsgld.analysis.budget import VarianceBudget, rounding_variance_after_noise, variance_budget
from lightning_lpsgld.analysis.diagnostics import ChainDiagnostic, chain_diagnostics, to_inference_data
from lightning_lpsgld.analysis.distance import best_on_grid, gibbs_on_grid, moments, variance_ratio, wasserstein2
from lightning_lpsgld.analysis.onestep import lattice_law, naive_law, vc_law
from lightning_lpsgld.analysis.phase_space import underdamped_stationary_law
from lightning_lpsgld.analysis.plan_report import LayerPlan, Plan
from lightning_lpsgld.analysis.planner import fraction_length_for, plan
from lightning_lpsgld.analysis.shrinkage import (
    ConvergenceModel,
    Shrinkage,
    Suggestion,
    expected_shrinkage,
    gradient_shrinkage,
    suggest_gradient_format,
)
from lightning_lpsgld.analysis.stationary import stationary_law, stationary_of, transition_matrix
from lightning_lpsgld.analysis.sum_law import view_law
from lightning_lpsgld.analysis.underdamped import underdamped_law

__all__ = [
    "ChainDiagnostic",
    "ConvergenceModel",
    "LayerPlan",
    "Plan",
    "Shrinkage",
    "Suggestion",
    "VarianceBudget",
    "best_on_grid",
    "chain_diagnostics",
    "expected_shrinkage",
    "fraction_length_for",
    "gibbs_on_grid",
    "gradient_shrinkage",
    "lattice_law",
    "moments",
    "naive_law",
    "plan",
    "rounding_variance_after_noise",
    "stationary_law",
    "stationary_of",
    "suggest_gradient_format",
    "to_inference_data",
    "transition_matrix",
    "underdamped_law",
    "underdamped_stationary_law",
    "variance_budget",
    "variance_ratio",
    "vc_law",
    "view_law",
    "wasserstein2",
]
