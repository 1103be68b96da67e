"""The Lightning precision plugin."""

from lightning_lpsgld.precision.card import PosteriorCard
from lightning_lpsgld.precision.changes import ChangedSettingsError
from lightning_lpsgld.precision.plugin import LowPrecisionSGLD
from lightning_lpsgld.precision.presets import PRESETS

__all__ = ["PRESETS", "ChangedSettingsError", "LowPrecisionSGLD", "PosteriorCard"]
