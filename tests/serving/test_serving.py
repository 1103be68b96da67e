"""Predictions through the Trainer: rows on disk are those of the ensemble, scores those of the metrics."""

import csv
import math

import lightning.pytorch as pl
import pytest
import torch
from helpers.models import SyntheticData, make_trainer, small_mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import PosteriorEnsemble
from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.metrics import CalibrationError, brier_score, categorical_nll
from lightning_lpsgld.predictive import Multiclass
from lightning_lpsgld.serving import PosteriorModule, PredictionWriter, prediction_columns


def bank_of(build, count=3):
    bank = SampleBank()
    for step in range(count):
        bank.add(build(step), step=step)
    return bank


def rows_of(path):
    if path.suffix == ".csv":
        with path.open() as file:
            return list(csv.DictReader(file))
    parquet = pytest.importorskip("pyarrow.parquet")
    return parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_are_the_predictions(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    module, data = PosteriorModule.from_bank(small_mlp(9), bank_of(small_mlp)), SyntheticData()
    module.ensemble.calibrate(data.val_dataloader(), coverage=0.8)
    path = tmp_path / "new" / f"predictions{suffix}"
    make_trainer(callbacks=[PredictionWriter(path)]).predict(module, data.test_dataloader(), return_predictions=False)
    expected = module(data.test.tensors[0])
    rows = rows_of(path)
    assert [int(row["index"]) for row in rows] == list(range(37))
    assert [int(row["target"]) for row in rows] == data.test.tensors[1].tolist()
    assert [int(row["label"]) for row in rows] == expected.labels.tolist()
    for row, p, sets in zip(rows, expected.mean, expected.sets):
        # float32 sums of products in other batches: a few units of the last place of a probability
        assert [float(row[f"probability_{i}"]) for i in range(3)] == pytest.approx(p.tolist(), abs=2e-6)
        assert row["set"] == " ".join(str(i) for i in range(3) if sets[i])
    assert {"confidence", "predictive_entropy", "expected_entropy", "mutual_information"} <= rows[0].keys()
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


class Regressor(pl.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Linear(3, 1)

    def forward(self, x):
        return self.net(x).squeeze(-1)


def values(n=20):
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(n, 3, generator=generator), torch.randn(n, generator=generator))


def test_regression_rows_and_scores(tmp_path):
    ensemble = PosteriorEnsemble(Regressor(7), bank_of(Regressor), task="regression", noise_std=0.5)
    ensemble.calibrate([values(49).tensors], coverage=0.5)
    module, loader = PosteriorModule(ensemble), DataLoader(values(), 6)
    trainer = make_trainer(callbacks=[PredictionWriter(tmp_path / "p.csv")])
    trainer.predict(module, loader)
    x, y = values().tensors
    expected, rows = module(x), rows_of(tmp_path / "p.csv")
    assert set(rows[0]) == {"dataloader", "index", "target", "mean", "epistemic", "aleatoric", "lower", "upper"}
    assert [float(row["upper"]) for row in rows] == pytest.approx(expected.upper.tolist(), abs=1e-5)
    (scores,) = trainer.test(module, loader, verbose=False)
    squared = (y - expected.mean).square()
    nll = (0.5 * (squared / expected.variance + (2 * math.pi * expected.variance).log())).mean()
    inside = (expected.lower <= y) & (y <= expected.upper)
    assert scores["ensemble/rmse"] == pytest.approx(squared.mean().sqrt().item(), rel=1e-5)
    assert scores["ensemble/nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert scores["ensemble/coverage"] == pytest.approx(inside.double().mean().item())


def test_scores_are_those_of_the_metrics():
    module, data = PosteriorModule.from_bank(small_mlp(9), bank_of(small_mlp)), SyntheticData()
    module.ensemble.calibrate(data.val_dataloader(), coverage=0.8)
    (scores,) = make_trainer().test(module, data, verbose=False)
    x, y = data.test.tensors
    expected = module(x)
    ece = CalibrationError()
    ece.update(expected.mean, y)
    assert scores["ensemble/accuracy"] == pytest.approx((expected.labels == y).double().mean().item(), rel=1e-6)
    assert scores["ensemble/nll"] == pytest.approx(categorical_nll(expected.mean, y).item(), rel=1e-5)
    assert scores["ensemble/brier"] == pytest.approx(brier_score(expected.mean, y).item(), rel=1e-5)
    assert scores["ensemble/ece"] == pytest.approx(ece.compute().item(), abs=1e-5)
    covered = expected.sets.gather(1, y[:, None]).double().mean().item()
    assert scores["ensemble/coverage"] == pytest.approx(covered, rel=1e-6)
    assert scores["ensemble/set_size"] == pytest.approx(expected.sets.sum(1).double().mean().item(), rel=1e-6)
    assert set(make_trainer().validate(module, data, verbose=False)[0]) == set(scores)


def test_scores_of_labels_and_of_pixels():
    build = lambda seed: nn.Linear(3, 4)  # noqa: E731
    module = PosteriorModule.from_bank(build(0), bank_of(build), task="multilabel")
    x, y = torch.randn(9, 3), torch.randint(2, (9, 4))
    (scores,) = make_trainer().test(module, DataLoader(TensorDataset(x, y), 4), verbose=False)
    expected = ((module(x).mean > 0.5) == (y > 0)).double().mean().item()
    assert scores["ensemble/accuracy"] == pytest.approx(expected, rel=1e-6)
    build = lambda seed: nn.Conv2d(1, 3, 1)  # noqa: E731
    module = PosteriorModule.from_bank(build(0), bank_of(build))
    x, y = torch.randn(5, 1, 4, 4), torch.randint(3, (5, 4, 4))
    (scores,) = make_trainer().test(module, DataLoader(TensorDataset(x, y), 2), verbose=False)
    assert scores["ensemble/accuracy"] == pytest.approx((module(x).labels == y).double().mean().item(), rel=1e-6)


def test_any_module_is_written(tmp_path):
    data, module = SyntheticData(), small_mlp()
    make_trainer(callbacks=[PredictionWriter(tmp_path / "p.csv")]).predict(module, data.test_dataloader())
    assert set(rows_of(tmp_path / "p.csv")[0]) == {"dataloader", "index", "target", "output_0", "output_1", "output_2"}


def test_several_loaders_are_told_apart(tmp_path):
    module, data = PosteriorModule.from_bank(small_mlp(9), bank_of(small_mlp)), SyntheticData()
    loaders = [data.val_dataloader(), data.test_dataloader()]
    make_trainer(callbacks=[PredictionWriter(tmp_path / "p.csv")]).predict(module, loaders)
    rows = rows_of(tmp_path / "p.csv")
    assert [int(row["dataloader"]) for row in rows] == [0] * 37 + [1] * 37
    assert [int(row["index"]) for row in rows] == 2 * list(range(37))


class Failing(pl.LightningModule):
    def predict_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("broken")
        return batch[0]


def test_a_failed_run_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("old\n")
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(callbacks=[PredictionWriter(path)]).predict(Failing(), SyntheticData().test_dataloader())
    assert path.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .parquet or .csv, got 'p.txt'"):
        PredictionWriter("p.txt")
    with pytest.raises(TypeError, match="`predict_step` gave list"):
        prediction_columns([1, 2])
    module = PosteriorModule.from_bank(small_mlp(9), bank_of(small_mlp))
    inputs = DataLoader(SyntheticData().test.tensors[0], 4)
    with pytest.raises(ValueError, match="a batch has no targets to test with"):
        make_trainer().test(module, inputs, verbose=False)
    narrow = DataLoader(TensorDataset(torch.randn(4, 6)), 4)
    with pytest.raises(ValueError, match="has other columns than the first"):
        make_trainer(callbacks=[PredictionWriter(tmp_path / "p.csv")]).predict(
            module, [SyntheticData().test_dataloader(), narrow]
        )


def test_several_loaders_have_scores_of_their_own():
    module, data = PosteriorModule.from_bank(small_mlp(9), bank_of(small_mlp)), SyntheticData()
    loaders = [data.val_dataloader(), data.test_dataloader()]
    scores = make_trainer().test(module, loaders, verbose=False)
    alone = [make_trainer().test(module, loader, verbose=False)[0] for loader in loaders]
    for number, own in enumerate(alone):
        for name, value in own.items():
            assert scores[number][f"{name}/dataloader_idx_{number}"] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("ignored", [None, 255])
def test_pixels_that_do_not_count_are_left_out(ignored):
    build = lambda seed: nn.Conv2d(1, 3, 1)  # noqa: E731
    module = PosteriorModule.from_bank(build(0), bank_of(build), task=Multiclass(ignore_index=ignored))
    x, y = torch.randn(5, 1, 4, 4), torch.randint(3, (5, 4, 4))
    y[:, 1:] = -100 if ignored is None else ignored
    (scores,) = make_trainer().test(module, DataLoader(TensorDataset(x, y), 2), verbose=False)
    expected = (module(x).labels == y)[:, :1].double().mean().item()
    assert scores["ensemble/accuracy"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_yes_or_no_may_be_written_as_the_loss_takes_it(dtype):
    build = lambda seed: nn.Linear(3, 1)  # noqa: E731
    module = PosteriorModule.from_bank(build(0), bank_of(build), task="binary")
    x, y = torch.randn(21, 3), (torch.rand(21, 1) > 0.5).to(dtype)
    module.ensemble.calibrate([(x, y)], coverage=0.8)
    (scores,) = make_trainer().test(module, DataLoader(TensorDataset(x, y), 4), verbose=False)
    assert scores["ensemble/accuracy"] == pytest.approx((module(x).labels == y[:, 0]).double().mean().item(), rel=1e-6)
    assert scores["ensemble/coverage"] >= 0.8


def test_targets_that_do_not_fit_are_refused():
    module = PosteriorModule.from_bank(small_mlp(9), bank_of(small_mlp))
    x = SyntheticData().test.tensors[0][:8]
    for targets, said in (
        (torch.full((8,), 7), "target 7 is no class of 3"),
        (torch.rand(8), "must be integer class indices"),
        (torch.zeros(8, 2, dtype=torch.long), "take one class a point"),
    ):
        with pytest.raises(ValueError, match=said):
            make_trainer().test(module, DataLoader(TensorDataset(x, targets), 4), verbose=False)
    module = PosteriorModule.from_bank(Regressor(7), bank_of(Regressor), task="regression", noise_std=0.5)
    data = DataLoader(TensorDataset(torch.randn(6, 3), torch.randn(6, 6)), 6)
    with pytest.raises(ValueError, match="must have the shape of the means"):
        make_trainer().test(module, data, verbose=False)
