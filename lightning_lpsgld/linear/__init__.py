"""Linear models trained in 8 bits: HALP with a scikit-learn-like front, and float32 SVRG of the same making."""

from lightning_lpsgld.linear.estimators import HALPClassifier, HALPRegressor
from lightning_lpsgld.linear.kernels import instruction_set, unavailable
from lightning_lpsgld.linear.solver import SolveReport

__all__ = ["HALPClassifier", "HALPRegressor", "SolveReport", "instruction_set", "unavailable"]
