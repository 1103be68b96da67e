"""The command line: arguments of the plugin by their names, callbacks by their class names."""

import sys

import pytest

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, SampleCollector

MODULE = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(16, 3), torch.randint(0, 2, (16,))), 4)
"""


def test_plugin_and_callbacks_are_configured_by_name(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from lightning_lpsgld.cli import LowPrecisionCLI

    (tmp_path / "cli_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "accumulator.yaml"
    config.write_text("lpsgld:\n  accumulator: fixed16.14\n")
    common = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    cli = LowPrecisionCLI(
        save_config_callback=None,
        args=[
            "fit", "--model=cli_module.Net", "--data=cli_module.Data", "--trainer.max_epochs=2", *common,
            "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}",
            "--lpsgld.temperature=0.5", "--lpsgld.weights=fixed8.6", "--lpsgld.seed=3",
            f"--config={config}",
            "--trainer.callbacks+=SampleCollector", "--trainer.callbacks.every=2",
            "--trainer.callbacks+=EnsembleEvaluation", "--trainer.callbacks.num_bins=10",
        ],
    )  # fmt: skip
    plugin = cli.trainer.precision_plugin
    assert isinstance(plugin, LowPrecisionSGLD)
    assert (plugin.card.temperature, plugin.card.seed, str(plugin.formats["weights"])) == (0.5, 3, "fixed8.6")
    assert str(plugin.accumulator) == "fixed16.14"
    assert cli.trainer.optimizers[0].description == "VC SGLDLP-L (fixed16.14 accumulator)"
    (collector,) = [c for c in cli.trainer.callbacks if isinstance(c, SampleCollector)]
    (evaluation,) = [c for c in cli.trainer.callbacks if isinstance(c, EnsembleEvaluation)]
    assert len(collector.bank) == 4
    assert evaluation.num_bins == 10
    sys.modules.pop("cli_module", None)
