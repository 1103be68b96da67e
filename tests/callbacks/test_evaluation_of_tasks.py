"""Any task in the Trainer; monitors from the first validation on; a long run is watched in linear time."""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from helpers.models import Classifier, SyntheticData, make_trainer, small_convnet, small_mlp
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.callbacks import EnsembleEvaluation, SampleCollector
from lightning_lpsgld.precision import LowPrecisionSGLD
from lightning_lpsgld.predictive import Regression, bayesian_model_average

PLAIN = {"activations": None, "errors": None}


class AnyTask(pl.LightningModule):
    """A linear layer, a form for its output, a loss."""

    def __init__(self, width, form, loss):
        super().__init__()
        self.layer, self.form, self.loss = nn.Linear(6, width), form, loss

    def forward(self, x):
        return self.form(self.layer(x))

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=0.1)


def numbers(*shape):
    return torch.randn(32, *shape, generator=torch.Generator().manual_seed(1))


def classes(high, *shape):
    return torch.randint(high, (32, *shape), generator=torch.Generator().manual_seed(1))


def with_ignored(targets, mark):
    targets.flatten()[::5] = mark
    return targets


def gaussian_loss(out, y):
    return functional.gaussian_nll_loss(out["mean"], y, out["log_variance"].exp())


#: width, form of the output, loss, targets, options of the callback, name of the task
TASKS = {
    "regression": (1, lambda o: o, lambda o, y: functional.mse_loss(o[:, 0], y), numbers(), {}, "regression"),
    "gaussian": (
        2, lambda o: {"mean": o[:, 0], "log_variance": o[:, 1]}, gaussian_loss, numbers(), {}, "regression"
    ),
    "one logit": (
        1, lambda o: o, lambda o, y: functional.binary_cross_entropy_with_logits(o[:, 0], y.float()), classes(2), {},
        "binary",
    ),
    "labels": (
        4, lambda o: o, lambda o, y: functional.binary_cross_entropy_with_logits(o, y.float()), classes(2, 4), {},
        "multilabel",
    ),
    "pixels": (
        12, lambda o: o.view(-1, 3, 2, 2), lambda o, y: functional.cross_entropy(o, y, ignore_index=255),
        with_ignored(classes(3, 2, 2), 255), {"ignore_index": 255}, "multiclass",
    ),
    "tokens": (
        12, lambda o: SimpleNamespace(logits=o.view(-1, 4, 3)),
        lambda o, y: functional.cross_entropy(o.logits.movedim(-1, 1), y), with_ignored(classes(3, 4), -100), {},
        "multiclass",
    ),
    "soft": (
        3, lambda o: {"logits": o}, lambda o, y: functional.cross_entropy(o["logits"], y),
        0.9 * functional.one_hot(classes(3), 3) + 0.1 / 3, {}, "multiclass",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.filterwarnings("ignore:Predictions are means")
def test_any_task_from_fit_to_test(name):
    """Fit, validate and test with the callback; scores are those of the bare average over the bank."""
    width, form, loss, targets, options, task = TASKS[name]
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, targets), 8)
    module, collector, callback = AnyTask(width, form, loss), SampleCollector(every=3), EnsembleEvaluation(**options)
    trainer = make_trainer(
        max_epochs=2, plugins=[LowPrecisionSGLD(seed=5, temperature=1.0, **PLAIN)], callbacks=[collector, callback],
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["ensemble/size"] == 2
    trainer.test(module, loader, verbose=False)
    expected = bayesian_model_average(collector.bank, module, loader, ignore_index=options.get("ignore_index"))
    assert expected.task.name == task
    scores = expected.scores | expected.further_scores() | {"ambiguity": expected.ambiguity, "size": 2.0}
    ensemble = {key: value for key, value in callback.scores.items() if key.startswith("ensemble/")}
    assert ensemble == pytest.approx({f"ensemble/{key}": value for key, value in scores.items()}, nan_ok=True)
    promised = {
        "rmse",
        "nll",
        "crps",
        "coverage_50",
        "coverage_90",
        "coverage_95",
        "width_90",
        "epistemic",
        "aleatoric",
    }
    assert task != "regression" or promised <= scores.keys()
    for key, value in ensemble.items():
        assert float(trainer.callback_metrics[key]) == pytest.approx(value, nan_ok=True)
    assert len(callback.reliability) == (task != "regression")


# --------------------------------------------------------------------------------------------- before the first sample


@pytest.mark.parametrize("every_n_epochs", [1, 3])
def test_monitors_find_their_key_from_the_first_validation_on(tmp_path, every_n_epochs):
    """Invariant: with no sample, ``ensemble/...`` are the scores of the current weights, and the size is 0."""
    seen = []

    class Watcher(Callback):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    checkpoint = ModelCheckpoint(tmp_path, monitor="ensemble/nll")
    stopping = EarlyStopping("ensemble/nll", patience=100)
    trainer = make_trainer(
        max_epochs=4,
        plugins=[LowPrecisionSGLD(seed=5)],
        callbacks=[
            SampleCollector(start=17, every=8),
            EnsembleEvaluation(every_n_epochs=every_n_epochs),
            Watcher(),
            checkpoint,
            stopping,
        ],
        enable_checkpointing=True,
    )
    trainer.fit(small_mlp(), datamodule=SyntheticData())
    assert [row["ensemble/size"] for row in seen][:2] == [0, 0]
    assert seen[-1]["ensemble/size"] > 0 or every_n_epochs == 3
    for name in ("accuracy", "nll", "brier", "ece"):
        assert seen[0][f"ensemble/{name}"] == seen[0][f"current/{name}"]
    assert seen[0]["ensemble/ambiguity"] == 0
    assert checkpoint.best_model_score is not None
    assert seen[0].keys() >= {"ensemble/aurc", "ensemble/disagreement", "ensemble/calibrated_nll"}


def test_weights_that_diverged_are_named_and_scored_nan():
    """Early stopping sees NaN; the validation itself goes on."""
    module = small_mlp()
    with torch.no_grad():
        module.net[0].weight.fill_(torch.nan)
    callback = EnsembleEvaluation(SampleBank())
    module.training_step = lambda batch, batch_idx: None
    trainer = make_trainer(callbacks=[callback], num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=r"current weights \(step 8\) predict NaN or infinite values for 37 points"):
        trainer.fit(module, datamodule=SyntheticData())
    assert callback.scores["ensemble/nll"] != callback.scores["ensemble/nll"]
    assert callback.scores["ensemble/size"] == 0


# --------------------------------------------------------------------------------------------------------- linear time


class Counting(Classifier):
    """Counts the points that pass through in evaluation mode."""

    def __init__(self, net):
        super().__init__(net)
        self.points = 0

    def forward(self, x):
        self.points += 0 if self.training else len(x)
        return super().forward(x)


class Passes(Callback):
    """Passes over the validation data at each validation, by the network itself, and the scores found."""

    def __init__(self, evaluation):
        self.evaluation, self.passes, self.scores = evaluation, [], []

    def on_validation_end(self, trainer, module):
        self.passes.append(module.points // 37)
        self.scores.append(dict(self.evaluation.scores))
        module.points = 0


def watched_run(data, module, epochs=4, **options):
    evaluation = EnsembleEvaluation(**options)
    watcher, collector = Passes(evaluation), SampleCollector(every=4)
    trainer = make_trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        plugins=[LowPrecisionSGLD(seed=5, **PLAIN)],
        callbacks=[collector, evaluation, watcher],
    )
    trainer.fit(module, datamodule=data)
    return watcher, collector.bank, evaluation


class Shuffled(SyntheticData):
    """A validation loader that shuffles, as the global generator says."""

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size, shuffle=True)


@pytest.mark.parametrize("data", [SyntheticData, Shuffled])
def test_a_validation_runs_only_new_samples(data):
    """Two samples an epoch: every validation takes the step's own pass, the current weights and two samples."""
    module = Counting(copy.deepcopy(small_mlp().net))
    watcher, bank, evaluation = watched_run(data(), module)
    assert watcher.passes == [4, 4, 4, 4]
    assert [scores["ensemble/size"] for scores in watcher.scores] == [2, 4, 6, 8]
    whole = bayesian_model_average(
        bank, module, data().val_dataloader() if data is SyntheticData else [data().val.tensors]
    )
    for name, value in whole.scores.items():
        assert watcher.scores[-1][f"ensemble/{name}"] == pytest.approx(value), name
    assert [point["index"] for point in evaluation.curve] == list(range(8))
    assert not evaluation._watches  # sums are let go at the end of the fit


def test_sums_are_made_anew_when_samples_are_others():
    """``max_samples`` picks others each time: all that are picked are run, and scores are theirs."""
    module = Counting(copy.deepcopy(small_mlp().net))
    watcher, bank, evaluation = watched_run(SyntheticData(), module, max_samples=3)
    assert watcher.passes == [4, 5, 5, 5]
    one, picked = SampleBank(), [point["index"] for point in evaluation.curve]
    for index in picked:
        bank.load_into(module, index)
        one.add(module, step=index)
    whole = bayesian_model_average(one, module, [SyntheticData().val.tensors])
    assert watcher.scores[-1]["ensemble/size"] == len(picked) == 3
    assert watcher.scores[-1]["ensemble/nll"] == pytest.approx(whole.scores["nll"])


def test_sums_are_made_anew_when_targets_are_others():
    """A loader whose targets change between validations, as with random augmentation of labels."""

    class Changing(SyntheticData):
        def val_dataloader(self):
            outer = self

            class Turning(TensorDataset):
                def __getitem__(self, index):
                    x, y = super().__getitem__(index)
                    return x, (y + outer.turn) % 3

            return DataLoader(Turning(*self.val.tensors), self.batch_size)

    data, module = Changing(), Counting(copy.deepcopy(small_mlp().net))
    data.turn = 0

    class Turn(Passes):
        def on_validation_end(self, trainer, module):
            super().on_validation_end(trainer, module)
            data.turn += 1

    evaluation, collector = EnsembleEvaluation(), SampleCollector(every=4)
    watcher = Turn(evaluation)
    trainer = make_trainer(
        max_epochs=3, num_sanity_val_steps=0, plugins=[LowPrecisionSGLD(seed=5, **PLAIN)],
        callbacks=[collector, evaluation, watcher],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert [scores["ensemble/size"] for scores in watcher.scores] == [2, 4, 6]
    x, y = data.val.tensors
    whole = bayesian_model_average(collector.bank, module, [(x, (y + 2) % 3)])
    assert watcher.scores[-1]["ensemble/nll"] == pytest.approx(whole.scores["nll"])


# ------------------------------------------------------------------------------------------------------- training data


def test_loaders_given_to_fit_are_remembered_for_test():
    """BatchNorm is refreshed in ``trainer.test`` with the loader that ``fit`` got as an argument."""
    data, module = SyntheticData(shape=(1, 6, 6), shuffle=False), small_convnet()
    collector, callback = SampleCollector(every=4), EnsembleEvaluation(refresh_batch_norm=3)
    trainer = make_trainer(plugins=[LowPrecisionSGLD(seed=5, **PLAIN)], callbacks=[collector, callback])
    trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    trainer.test(module, data.test_dataloader(), verbose=False)
    batches = [batch for _, batch in zip(range(3), data.train_dataloader())]
    expected = bayesian_model_average(collector.bank, module, data.test_dataloader(), refresh_batch_norm=batches)
    for name, value in expected.scores.items():
        assert callback.scores[f"ensemble/{name}"] == pytest.approx(value)
    stale = bayesian_model_average(collector.bank, module, data.test_dataloader())
    assert stale.scores["nll"] != pytest.approx(expected.scores["nll"])


def test_training_data_that_is_nowhere_comes_with_a_way_out():
    module, bank = small_convnet(), SampleBank()
    bank.add(module, step=1)
    callback = EnsembleEvaluation(bank, refresh_batch_norm=2)
    trainer = make_trainer(callbacks=[callback])
    with pytest.raises(RuntimeError, match=r"gave none. Pass `datamodule=`.*define `train_dataloader`"):
        trainer.test(module, SyntheticData(shape=(1, 6, 6)).test_dataloader(), verbose=False)


# ------------------------------------------------------------------------------------------------------------- verdict


def test_samples_that_are_too_alike_are_called_so():
    module, bank = small_mlp(), SampleBank()
    for step in range(3):
        bank.add(module, step=step)
    callback = EnsembleEvaluation(bank)
    with pytest.warns(UserWarning, match=r"The 3 samples are too alike to be worth averaging.*SampleCollector\(every"):
        make_trainer(callbacks=[callback]).test(module, datamodule=SyntheticData(), verbose=False)
    assert callback.scores["ensemble/disagreement"] == 0
    assert callback.scores["ensemble/ambiguity"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "detection"}, "`task` must be 'auto'"),
        ({"task": Regression(), "ignore_index": 3}, "Give `ignore_index` to Regression"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleEvaluation(**options)
