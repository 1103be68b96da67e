"""Ensemble scores against their definition, and a trainer that is left as it was."""

import copy
import gc

import pytest
import torch
from helpers.models import Classifier, RecordingLogger, SyntheticData, make_trainer, small_convnet, small_mlp
from helpers.toy_metric import TopTwo, top_two
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MetricCollection

from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.callbacks import EnsembleEvaluation, SampleCollector, passes
from lightning_lpsgld.metrics import brier_score, calibration_error, categorical_nll, entropy
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.precision import LowPrecisionSGLD
from lightning_lpsgld.predictive import refresh_batch_norm

FLOATS_ONLY = {"activations": None, "errors": None}  # so that a plain forward pass is the reference


def perturbed_bank(module, samples=4, path=None):
    """Samples that differ clearly: the module's weights plus noise."""
    bank, noisy = SampleBank(path), copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for step in range(samples):
        with torch.no_grad():
            for param, source in zip(noisy.parameters(), module.parameters()):
                param.copy_(source + 0.5 * torch.randn(param.shape, generator=generator))
            for buffer in noisy.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        bank.add(noisy, step=10 * (step + 1), chain=step % 2)
    return bank


@torch.no_grad()
def predictions(bank, module, dataset, batch_size=8, before=lambda module: None):
    """Probabilities of all samples, shape (samples, points, classes), by a loop that shares nothing with ours."""
    module = copy.deepcopy(module).eval()
    found = []
    for index in range(len(bank)):
        bank.load_into(module, index)
        before(module)
        batches = [module(x).softmax(1) for x, _ in DataLoader(dataset, batch_size)]
        found.append(torch.cat(batches))
    return torch.stack(found).double()


def scores_of(probabilities, targets):
    return {
        "accuracy": float((probabilities.argmax(1) == targets).double().mean()),
        "nll": float(categorical_nll(probabilities, targets)),
        "brier": float(brier_score(probabilities, targets)),
        "ece": float(calibration_error(probabilities, targets)),
        "ece_paper": float(calibration_error(probabilities, targets, variant="paper")),
    }


def evaluate(callback, module=None, data=None, stage="test", **options):
    trainer = make_trainer(callbacks=[callback], **options)
    module = small_mlp() if module is None else module
    getattr(trainer, stage)(module, datamodule=SyntheticData() if data is None else data, verbose=False)
    return trainer


# ----------------------------------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_scores_are_those_of_the_mean_of_all_probabilities(stage):
    module, data = small_mlp(), SyntheticData()
    bank, callback = perturbed_bank(module), EnsembleEvaluation(None)
    callback.source = bank
    trainer = evaluate(callback, module, data, stage)
    dataset = data.val if stage == "validate" else data.test
    targets, every = dataset.tensors[1], predictions(bank, module, dataset)

    for name, value in scores_of(every.mean(0), targets).items():
        assert trainer.callback_metrics[f"ensemble/{name}"] == pytest.approx(value)
    single = [scores_of(sample, targets) for sample in every]
    for name in single[0]:
        assert callback.scores[f"single/{name}"] == pytest.approx(sum(s[name] for s in single) / 4)
    mutual = entropy(every.mean(0)) - entropy(every).mean(0)
    assert callback.scores["ensemble/mutual_information"] == pytest.approx(float(mutual.mean()))
    assert callback.scores["ensemble/size"] == 4
    for k, point in enumerate(callback.curve, start=1):
        assert (point["size"], point["step"], point["chain"]) == (k, 10 * k, (k - 1) % 2)
        for name, value in scores_of(every[:k].mean(0), targets).items():
            assert point[f"ensemble/{name}"] == pytest.approx(value)
        for name, value in single[k - 1].items():
            assert point[f"sample/{name}"] == pytest.approx(value)


def test_a_score_of_ones_own_stands_beside_the_others():
    """Of the ensemble, of each sample and of the network as it is; in the curve, too."""
    module, data = small_mlp(), SyntheticData()
    bank = perturbed_bank(module)
    callback = EnsembleEvaluation(bank, metrics=lambda num_classes: MetricCollection({"top_two": TopTwo()}))
    trainer = evaluate(callback, module, data)
    targets, every = data.test.tensors[1], predictions(bank, module, data.test)
    whole, alone = float(top_two(every.mean(0), targets).mean()), [float(top_two(p, targets).mean()) for p in every]
    assert trainer.callback_metrics["ensemble/top_two"] == pytest.approx(whole)
    assert trainer.callback_metrics["single/top_two"] == pytest.approx(sum(alone) / len(alone))
    assert "current/top_two" in trainer.callback_metrics
    assert [point["sample/top_two"] for point in callback.curve] == pytest.approx(alone)
    assert trainer.callback_metrics["ensemble/nll"] == pytest.approx(float(categorical_nll(every.mean(0), targets)))


def test_current_is_the_network_as_it_is():
    module, data = small_mlp(), SyntheticData()
    callback = EnsembleEvaluation(perturbed_bank(module))
    evaluate(callback, module, data)
    with torch.no_grad():
        probabilities = module(data.test.tensors[0]).softmax(1)
    for name, value in scores_of(probabilities, data.test.tensors[1]).items():
        assert callback.scores[f"current/{name}"] == pytest.approx(value)


def test_number_of_bins():
    module, data = small_mlp(), SyntheticData()
    bank = perturbed_bank(module)
    callback = EnsembleEvaluation(bank, num_bins=4)
    evaluate(callback, module, data)
    mean = predictions(bank, module, data.test).mean(0)
    assert callback.scores["ensemble/ece"] == pytest.approx(float(calibration_error(mean, data.test.tensors[1], 4)))


def test_limits_on_batches_are_kept():
    module, data = small_mlp(), SyntheticData()
    bank = perturbed_bank(module)
    callback = EnsembleEvaluation(bank)
    evaluate(callback, module, data, limit_test_batches=2)
    points = TensorDataset(*(t[:16] for t in data.test.tensors))
    expected = scores_of(predictions(bank, module, points).mean(0), points.tensors[1])
    assert callback.scores["ensemble/nll"] == pytest.approx(expected["nll"])
    callback.scores = {}
    evaluate(callback, module, data, "validate", limit_val_batches=0)
    assert callback.scores == {}


def test_several_dataloaders_get_a_suffix_each():
    class Two(SyntheticData):
        def test_dataloader(self):
            return [DataLoader(self.test, 8), DataLoader(self.val, 5)]

    module, data = small_mlp(), Two()
    bank = perturbed_bank(module)
    callback = EnsembleEvaluation(bank)
    logger = RecordingLogger()
    trainer = evaluate(callback, module, data, logger=logger)
    for number, dataset in enumerate((data.test, data.val)):
        expected = scores_of(predictions(bank, module, dataset).mean(0), dataset.tensors[1])
        for name, value in expected.items():
            assert trainer.callback_metrics[f"ensemble/{name}/dataloader_idx_{number}"] == pytest.approx(value)
    assert [point["dataloader_idx"] for point in callback.curve] == [0] * 4 + [1] * 4
    curve = [
        row["ensemble_curve/nll/dataloader_idx_1"]
        for _, row in logger.rows
        if "ensemble_curve/nll/dataloader_idx_1" in row
    ]
    assert curve == [point["ensemble/nll"] for point in callback.curve[4:]]


def test_the_curve_goes_to_the_logger():
    callback = EnsembleEvaluation(perturbed_bank(small_mlp()))
    logger = RecordingLogger()
    evaluate(callback, logger=logger)
    rows = [(step, row) for step, row in logger.rows if "ensemble_curve/nll" in row]
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    assert [row["ensemble_curve/nll"] for _, row in rows] == [point["ensemble/nll"] for point in callback.curve]
    assert [row["ensemble_curve/sample_nll"] for _, row in rows] == [point["sample/nll"] for point in callback.curve]


def test_a_shuffling_loader_gives_the_same_scores():
    class Shuffled(SyntheticData):
        def test_dataloader(self):
            return DataLoader(self.test, len(self.test), shuffle=True)

    module = small_mlp()
    callback, shuffled = (EnsembleEvaluation(perturbed_bank(module)) for _ in range(2))
    evaluate(callback, module, SyntheticData(batch_size=37))
    evaluate(shuffled, module, Shuffled())
    assert callback.scores == pytest.approx(shuffled.scores)


def test_at_most_so_many_samples_evenly_spaced():
    bank = perturbed_bank(small_mlp(), samples=7)
    callback = EnsembleEvaluation(bank, max_samples=3)
    evaluate(callback)
    assert [point["index"] for point in callback.curve] == [2, 4, 6]
    assert [point["step"] for point in callback.curve] == [30, 50, 70]
    assert callback.scores["ensemble/size"] == 3


# ------------------------------------------------------------------------------------------------------ unknown modules


class Mapped(Classifier):
    """Batches are dicts, ``forward`` is of no use; ``predict_step`` gives logits."""

    def forward(self, *args):
        raise NotImplementedError

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return self.net(batch["x"])


class DictData(SyntheticData):
    def test_dataloader(self):
        def collate(points):
            return {"x": torch.stack([x for x, _ in points]), "y": torch.stack([y for _, y in points])}

        return DataLoader(self.test, self.batch_size, collate_fn=collate)


@pytest.mark.parametrize("logits", ["predict_step", lambda module, batch: (module.net(batch["x"]), batch["y"])])
def test_logits_of_other_modules(logits):
    module = small_mlp()
    plain = EnsembleEvaluation(perturbed_bank(module))
    evaluate(plain, module)
    mapped = Mapped(module.net)
    callback = EnsembleEvaluation(plain.source, logits=logits)
    evaluate(callback, mapped, DictData())
    assert callback.scores == plain.scores


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (lambda m, b: m(b[0]), TypeError, r"`logits` must return \(logits, targets\), got Tensor"),
        (
            lambda m, b: (m(b[0]).argmax(1), b[1]),
            TypeError,
            "must be a floating tensor, but the function gave torch.int64",
        ),
        (lambda m, b: ({"logits": 1}, b[1]), TypeError, "must be a floating tensor, but the function gave dict"),
        (lambda m, b: (m(b[0])[:, 0], b[1]), ValueError, r"shape \(batch, classes\)"),
        (lambda m, b: (m(b[0]), b[1].float()), TypeError, "integer class indices, got torch.float32"),
        (lambda m, b: (m(b[0]), None), TypeError, "integer class indices, got NoneType"),
        (lambda m, b: (m(b[0]), b[1] + 1), ValueError, r"target 3 is no class of 3 \(0 to 2\).*pass ignore_index=3"),
        (lambda m, b: (m(b[0]), b[1][:, None].float().expand(-1, 2)), ValueError, "fit no task"),
        (lambda m, b: ((m(b[0]), m(b[0])), b[1]), TypeError, r"pair of tensors.*outputs='mean_variance'"),
        (lambda m, b: (m(b[0]), b[1][:1]), ValueError, r"targets must have shape \(8,\).*got \(1,\)"),
    ],
)
def test_what_are_no_logits_or_targets_is_said(logits, error, message):
    module = small_mlp()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        evaluate(EnsembleEvaluation(perturbed_bank(module), logits=logits), module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# --------------------------------------------------------------------------------------------------- nothing is changed


def test_the_module_is_as_before_also_when_the_loop_raises():
    module, calls = small_convnet(), []
    module.net[1].eval()  # a frozen BatchNorm stays in its mode

    def third_sample_fails(m, batch):
        calls.append(1)
        if len(calls) > 13:  # 5 batches of `current`, 5 of the first sample
            raise RuntimeError("broken")
        return m(batch[0]), batch[1]

    before = copy.deepcopy(module.state_dict())
    data, pointers = SyntheticData(shape=(1, 6, 6)), [p.data_ptr() for p in module.parameters()]
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(EnsembleEvaluation(perturbed_bank(module), logits=third_sample_fails), module, data)
    evaluate(EnsembleEvaluation(perturbed_bank(module)), module, data)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [p.data_ptr() for p in module.parameters()] == pointers
    assert not module.net[1].training


def test_watching_the_ensemble_does_not_change_the_chain():
    """Invariant: weights and samples are bitwise those of a run without evaluation; dropout and shuffling are on."""

    def run(*callbacks):
        torch.manual_seed(11)
        collector, module = SampleCollector(start=4, every=3), small_mlp(dropout=0.3)
        trainer = make_trainer(
            max_epochs=2,
            val_check_interval=3,
            num_sanity_val_steps=0,
            plugins=[LowPrecisionSGLD(seed=5)],
            callbacks=[collector, *callbacks],
        )
        trainer.fit(module, datamodule=SyntheticData())
        return module, collector.bank

    plain, bank = run()
    watched, same = run(EnsembleEvaluation(refresh_batch_norm=2))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters()))
    for a, b in zip(bank, same):
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_at_most_two_samples_beyond_the_module_are_in_memory(where, tmp_path):
    """Bytes of the tensors alive in a forward pass, above those before: the module's own copy and a stored sample."""
    module = Classifier(torch.nn.Sequential(torch.nn.Linear(6, 20_000), torch.nn.Linear(20_000, 3)))
    bank = perturbed_bank(module, samples=3, path=tmp_path / "bank" if where == "disk" else None)
    alive = []

    def live_bytes():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def logits(module, batch):
        alive.append(live_bytes())
        return module(batch[0]), batch[1]

    before = live_bytes()
    evaluate(EnsembleEvaluation(bank, logits=logits), module, SyntheticData(batch_size=37))
    size = sum(p.nbytes for p in module.parameters())
    assert size <= max(alive) - before <= 2 * size + 10_000  # and one small batch with its sums


@pytest.mark.slow
def test_a_hundred_samples_of_resnet18_take_at_most_two_beyond_the_model(tmp_path):
    """Peak of live tensor bytes in any forward pass over a durable bank, above those before the evaluation."""
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(num_classes=3)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(quantize(param, "bfp8", rounding="nearest"))
    module = Classifier(net)
    bank = SampleBank(tmp_path / "bank")
    for step in range(100):
        with torch.no_grad():
            net.fc.bias.fill_(step / 64)
        bank.add(module, step=step, formats={name: "bfp8" for name, _ in module.named_parameters()})
    peak, data = 0, SyntheticImages()

    def live_bytes():
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def logits(module, batch):
        nonlocal peak
        peak = max(peak, live_bytes())
        return module(batch[0]), batch[1]

    gc.collect()
    before = live_bytes()
    evaluate(EnsembleEvaluation(tmp_path / "bank", logits=logits), module, data)
    sample = sum(t.nbytes for t in module.state_dict().values())
    print(f"model {before / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB, sample {sample / 1e6:.1f} MB as float32")
    assert sample <= peak - before <= 2 * sample


class SyntheticImages(SyntheticData):
    """Four small images, which leave the count of bytes to the samples."""

    def test_dataloader(self):
        """One batch."""
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.tensor([0, 1, 2, 0])), 4)


# ---------------------------------------------------------------------------------------------- where samples come from


def test_a_path_in_a_fresh_process(tmp_path):
    """Train, keep only files; another trainer without plugin and collector tests from checkpoint and bank."""
    module, data = small_mlp(), SyntheticData()
    collector = SampleCollector(tmp_path / "bank", every=6)
    trainer = make_trainer(max_epochs=2, plugins=[LowPrecisionSGLD(seed=5, **FLOATS_ONLY)], callbacks=[collector])
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    bank, fresh = SampleBank.open(tmp_path / "bank"), small_mlp(seed=9)
    callback = EnsembleEvaluation(tmp_path / "bank")
    make_trainer(callbacks=[callback]).test(fresh, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    expected = scores_of(predictions(bank, module, data.test).mean(0), data.test.tensors[1])
    assert {name: callback.scores[f"ensemble/{name}"] for name in expected} == pytest.approx(expected)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), module.parameters()))


def test_within_a_fit_from_the_first_sample_on():
    class Logged(Callback):
        def __init__(self):
            self.sizes = []

        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                self.sizes.append(trainer.callback_metrics.get("ensemble/size"))

    logged, callback = Logged(), EnsembleEvaluation(every_n_epochs=2)
    trainer = make_trainer(
        max_epochs=6,
        plugins=[LowPrecisionSGLD(seed=5)],
        callbacks=[callback, SampleCollector(start=16, every=4), logged],
    )
    trainer.fit(small_mlp(), datamodule=SyntheticData())
    assert logged.sizes == [0, 0, 0, 4, 4, 8]  # the first validation, then epochs 2, 4, 6; before the first sample 0
    trainer.test(trainer.lightning_module, datamodule=SyntheticData(), verbose=False)
    assert trainer.callback_metrics["ensemble/size"] == 8


def test_an_empty_bank_is_an_error_in_test_and_a_warning_in_validate(tmp_path):
    with pytest.raises(RuntimeError, match=r"nothing to test.*Fit with a SampleCollector first"):
        evaluate(EnsembleEvaluation(SampleBank()))
    with pytest.raises(BankError, match="no sample bank"):
        evaluate(EnsembleEvaluation(tmp_path / "nowhere"))
    for source in (SampleBank(), tmp_path / "nowhere"):
        with pytest.warns(UserWarning, match="nothing to evaluate"):
            evaluate(EnsembleEvaluation(source), stage="validate")


def test_without_any_source_setup_says_so():
    with pytest.raises(RuntimeError, match=r"there are 0 of them. Add one to `callbacks`, or pass"):
        evaluate(EnsembleEvaluation())
    trainer = make_trainer(callbacks=[EnsembleEvaluation(), SampleCollector(), SampleCollector(chain=1)])
    with pytest.raises(RuntimeError, match=r"there are 2 of them"):
        trainer.test(small_mlp(), datamodule=SyntheticData(), verbose=False)


def test_a_bank_of_another_module_is_refused():
    with pytest.raises(BankError, match="not the one that was sampled"):
        evaluate(EnsembleEvaluation(perturbed_bank(small_convnet())))


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}])
def test_dry_and_bare_trainers(options):
    callback = EnsembleEvaluation()
    trainer = make_trainer(plugins=[LowPrecisionSGLD(seed=5)], callbacks=[SampleCollector(), callback], **options)
    trainer.fit(small_mlp(), datamodule=SyntheticData())
    trainer.test(trainer.lightning_module, datamodule=SyntheticData(), verbose=False)
    assert callback.scores["ensemble/size"] == (1 if "fast_dev_run" in options else 8)


def test_stages_are_chosen():
    callback = EnsembleEvaluation(perturbed_bank(small_mlp()), stages="validate")
    evaluate(callback)
    assert callback.scores == {}
    evaluate(callback, stage="validate")
    assert callback.scores["ensemble/size"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ()}, "`stages`"),
        ({"stages": ("train",)}, "`stages`"),
        ({"logits": "logits"}, "`logits`"),
        ({"num_bins": 0}, "`num_bins`"),
        ({"every_n_epochs": 0}, "`every_n_epochs`"),
        ({"refresh_batch_norm": 0}, "`refresh_batch_norm`"),
        ({"max_samples": True}, "`max_samples`"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleEvaluation(**options)


# ------------------------------------------------------------------------------------------------- BatchNorm statistics


@pytest.mark.parametrize("within", ["fit", "test"])
def test_batch_norm_statistics_are_measured_for_every_sample(within):
    module, data = small_convnet(), SyntheticData(shape=(1, 6, 6), shuffle=False)
    bank = perturbed_bank(module)
    callback = EnsembleEvaluation(bank, refresh_batch_norm=3)
    if within == "test":
        evaluate(callback, module, data)
    else:
        trainer = make_trainer(callbacks=[callback], num_sanity_val_steps=0)
        trainer.fit(module, datamodule=data)
    train = [tuple(t[i : i + 8] for t in data.train.tensors) for i in (0, 8, 16)]
    dataset = data.test if within == "test" else data.val
    every = predictions(bank, module, dataset, before=lambda m: refresh_batch_norm(m, train))
    expected = scores_of(every.mean(0), dataset.tensors[1])
    assert {name: callback.scores[f"ensemble/{name}"] for name in expected} == pytest.approx(expected)
    stale = scores_of(predictions(bank, module, dataset).mean(0), dataset.tensors[1])
    assert stale["nll"] != pytest.approx(expected["nll"])


def test_no_training_data_to_refresh_with_is_said():
    class TestOnly(SyntheticData):
        def train_dataloader(self):
            raise AttributeError("train was never set up")

    module = small_convnet()
    with pytest.raises(RuntimeError, match=r"needs training batches, but TestOnly.train_dataloader\(\) gave none"):
        evaluate(EnsembleEvaluation(perturbed_bank(module), refresh_batch_norm=2), module, TestOnly(shape=(1, 6, 6)))


# --------------------------------------------------------------------------------------------------- distributed shares


@pytest.mark.parametrize(("points", "world"), [(37, 2), (37, 3), (8, 3), (9, 4), (3, 5)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_shares_of_all_ranks_hold_every_point_once(points, world, shuffle, monkeypatch):
    """Invariant: over the ranks of a DistributedSampler, the items' unpadded points are the data set, each once."""
    monkeypatch.setattr(passes, "_on_device", lambda trainer, batch, number: batch)
    trainer, module, seen = make_trainer(), small_mlp(), []
    dataset = TensorDataset(torch.arange(points).float().unsqueeze(1), torch.arange(points))
    for rank in range(world):
        loader = DataLoader(dataset, 4, sampler=DistributedSampler(dataset, world, rank, shuffle=shuffle))
        batches = passes.EvaluationBatches(trainer, loader, float("inf"), 0, lambda m, b: (b[0].repeat(1, 2), b[1]))
        for item in batches:
            logits = passes.logits_of(module, item)
            assert torch.equal(logits[:, 0].long(), item.targets)
            seen += item.targets.tolist()
    assert sorted(seen) == list(range(points))
