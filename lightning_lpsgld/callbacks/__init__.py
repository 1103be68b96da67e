"""Lightning callbacks: collect samples, score the ensemble, measure temperature and gradients."""

from lightning_lpsgld.callbacks.chain_diagnostics import ChainDiagnostics
from lightning_lpsgld.callbacks.collector import SampleCollector
from lightning_lpsgld.callbacks.effective_temperature import EffectiveTemperature
from lightning_lpsgld.callbacks.evaluation import EnsembleEvaluation
from lightning_lpsgld.callbacks.gradient_shrinkage import GradientShrinkage
from lightning_lpsgld.callbacks.sampling_progress import SamplingProgress
from lightning_lpsgld.callbacks.schedule import CollectionSchedule
from lightning_lpsgld.callbacks.step_seeding import StepSeeding

__all__ = [
    "ChainDiagnostics",
    "CollectionSchedule",
    "EffectiveTemperature",
    "EnsembleEvaluation",
    "GradientShrinkage",
    "SampleCollector",
    "SamplingProgress",
    "StepSeeding",
]
