"""Samples, cycle, effective temperature and ensemble NLL where people look: progress bars and loggers."""

import csv
import os
import re
from unittest import mock

import pytest
from helpers.models import RecordingLogger, SyntheticData, make_trainer, small_mlp
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_lpsgld import EffectiveTemperature, EnsembleEvaluation, LowPrecisionSGLD, SampleCollector
from lightning_lpsgld.callbacks.sampling_progress import SamplingProgress

NAMES = {"samples", "cycle", "T_eff", "ensemble_nll"}


def callbacks():
    return [
        SampleCollector(every=2), EffectiveTemperature(every_n_steps=1, verdict=False), EnsembleEvaluation(),
        SamplingProgress(),
    ]  # fmt: skip


def options(**more):
    plugin = LowPrecisionSGLD(seed=0, cycles=2, temperature=1.0)
    return {"plugins": [plugin], "max_epochs": 2, "log_every_n_steps": 1, **more}


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bars_show_it(bar):
    trainer = make_trainer(**options(callbacks=[*callbacks(), bar()], enable_progress_bar=True))
    trainer.fit(small_mlp(), SyntheticData())
    shown = trainer.progress_bar_callback.get_metrics(trainer, trainer.lightning_module)
    assert shown.keys() >= NAMES
    collector, meter = trainer.callbacks[:2]
    assert float(shown["samples"]) == collector.collected == 8
    assert float(shown["T_eff"]) == pytest.approx(meter.table["overall"]["effective_temperature"], rel=1e-2)


def test_the_loggers_get_it(tmp_path):
    recording, file = RecordingLogger(), CSVLogger(tmp_path)
    trainer = make_trainer(**options(callbacks=callbacks(), logger=[recording, file]))
    trainer.fit(small_mlp(), SyntheticData())
    assert {name for _, row in recording.rows for name in row} >= NAMES
    counts = [row["samples"] for _, row in recording.rows if "samples" in row]
    assert counts == [i // 2 for i in range(1, 17)]  # sixteen steps, one sample every second
    cycles = {row["cycle"] for _, row in recording.rows if "cycle" in row}
    assert cycles >= {0.0, 1.0}
    with open(next(tmp_path.rglob("metrics.csv"))) as rows:
        assert set(next(csv.reader(rows))) >= NAMES
    names = {name for _, row in recording.rows for name in row}
    assert len(names) > 20
    assert all(re.fullmatch(r"[\w\-. /:]{1,250}", name) for name in names), "MLflow takes no others"


def made(kind, folder):
    """A logger of Lightning that keeps what it gets in a folder."""
    if kind == "tensorboard":
        pytest.importorskip("tensorboardX")
        return TensorBoardLogger(folder)
    if kind == "wandb":
        pytest.importorskip("wandb")
        return WandbLogger(save_dir=folder, offline=True)
    pytest.importorskip("mlflow")
    return MLFlowLogger(tracking_uri=f"sqlite:///{folder}/runs.db")


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
@pytest.mark.filterwarnings("ignore")
@mock.patch.dict(os.environ)  # their packages leave variables of their own
def test_the_loggers_of_others_get_it(tmp_path, kind):
    logger = made(kind, str(tmp_path))
    trainer = make_trainer(**options(callbacks=callbacks(), logger=logger))
    trainer.fit(small_mlp(), SyntheticData())
    if kind == "mlflow":
        got = set(logger.experiment.get_run(logger.run_id).data.metrics)
    elif kind == "wandb":
        got = set(dict(logger.experiment.summary))
        logger.experiment.finish()
    else:
        logger.experiment.flush()
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
        got = {name for name in NAMES if name.encode() in written}
    assert got >= NAMES


def test_nothing_is_invented():
    trainer = make_trainer(**options(callbacks=[SampleCollector(every=2), SamplingProgress(prog_bar=False)]))
    trainer.fit(small_mlp(), SyntheticData())
    assert set(SamplingProgress().values(trainer)) == {"samples", "cycle"}
    assert not NAMES & trainer.progress_bar_metrics.keys()


def test_nothing_to_show_is_refused():
    with pytest.raises(RuntimeError, match="SamplingProgress has nothing to show"):
        make_trainer(**options(callbacks=[SamplingProgress()])).fit(small_mlp(), SyntheticData())
