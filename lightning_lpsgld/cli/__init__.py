"""The ``lpsgld`` command: LightningCLI with the plugin and the callbacks, the planner, banks, reports and export.

Needs the extra ``cli`` (jsonargparse).
"""

from lightning_lpsgld.cli.main import main
from lightning_lpsgld.cli.trainer import LowPrecisionCLI

__all__ = ["LowPrecisionCLI", "main"]
