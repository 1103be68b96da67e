"""What reads banks reads one whose frozen weights stand there once, or only as checksums, with the same numbers."""

import copy

import pytest
import torch
from helpers.models import Classifier, SyntheticData, make_trainer
from helpers.processes import run_ranks
from torch import nn

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, SampleBank, SampleCollector
from lightning_lpsgld.predictive import PosteriorEnsemble, bayesian_model_average
from lightning_lpsgld.predictive.probes import chain_draws
from lightning_lpsgld.report.facts import gather

KINDS = ("stored", "reference")


def classifier():
    torch.manual_seed(0)
    module = Classifier(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)))
    module.net[0].requires_grad_(False)
    return module


def fit(path, kind, *callbacks, steps=8, resume=None, ranks=1, **options):
    collector = SampleCollector(path, start=2, every=2, base=kind, **options)
    module = classifier()
    several = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    trainer = make_trainer(
        max_epochs=-1, max_steps=steps, plugins=[LowPrecisionSGLD(seed=3)], callbacks=[collector, *callbacks],
        limit_val_batches=0, **several,
    )  # fmt: skip
    data = SyntheticData(n_train=8 * ranks, copies=16, shuffle=False)
    trainer.fit(module, data, ckpt_path=resume)
    return module, trainer, collector


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """Path by kind; ``whole`` has every tensor in every sample."""
    folder = tmp_path_factory.mktemp("banks")
    for kind in KINDS:
        fit(folder / kind, kind)
    with SampleBank(folder / "whole") as whole:
        for sample in SampleBank.open(folder / "stored"):
            formats = {entry.name: entry.format for entry in sample.spec.entries}
            whole.add(sample.state_dict(), step=sample.step, formats=formats, constant=())
    return {path.name: path for path in folder.iterdir()}


def read_everywhere(path, folder):
    """Numbers that each reader gives."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.tensor([0, 1, 2, 0, 1]))]
    found = {}
    for members in ("stacked", "streamed"):
        ensemble = PosteriorEnsemble.from_bank(classifier(), path, task="multiclass", members=members)
        found[members] = ensemble(x).mean
    found["not in memory"] = PosteriorEnsemble.from_bank(classifier(), path, in_memory=False, task="multiclass")(x).mean
    bank = SampleBank.open(path)
    found["average"] = torch.tensor(list(bayesian_model_average(bank, classifier(), batches).scores.values()))
    found["draws"] = torch.stack(list(chain_draws(bank).values())) if path.name != "whole" else None
    module = classifier()
    trainer = make_trainer(callbacks=[EnsembleEvaluation(path)], logger=False)
    (scores,) = trainer.test(module, SyntheticData(), verbose=False)
    found["evaluation"] = torch.tensor([scores["ensemble/nll"], scores["ensemble/accuracy"]])
    return found


def test_every_reader_gives_the_numbers_of_a_whole_bank(banks, tmp_path):
    expected = read_everywhere(banks["whole"], tmp_path)
    found = {kind: read_everywhere(banks[kind], tmp_path) for kind in KINDS}
    for kind in KINDS:
        for name, value in expected.items():
            assert value is None or torch.equal(found[kind][name], value), (kind, name)
    assert torch.equal(found["stored"]["draws"], found["reference"]["draws"])


@pytest.mark.parametrize("kind", KINDS)
def test_exports_give_them_too(banks, tmp_path, kind):
    from lightning_lpsgld.export import export_program

    x = torch.randn(4, 6)
    export_program(classifier(), banks[kind], tmp_path / "ensemble.pt2", x, task="multiclass")
    answer = torch.export.load(str(tmp_path / "ensemble.pt2")).module()(x)
    expected = PosteriorEnsemble.from_bank(classifier(), banks["whole"], task="multiclass")(x)
    assert torch.allclose(answer["mean"], expected.mean, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_says_where_frozen_weights_stand(banks, kind):
    module = classifier()
    bank = SampleBank.open(banks[kind])
    facts = gather(bank, module, [(torch.randn(8, 6), torch.randint(3, (8,)))])
    words = {"stored": "2 frozen tensors stand there once", "reference": "2 frozen tensors stand there as checksums"}
    assert facts.card["size"].endswith(words[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_resumed_run_leaves_the_bank_of_an_uninterrupted_one(tmp_path, kind, where):
    path = (lambda name: tmp_path / name) if where == "disk" else (lambda name: None)
    whole = fit(path("whole"), kind)[2].bank
    _, trainer, _ = fit(path("bank"), kind, steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(path("bank"), kind, resume=tmp_path / "half.ckpt")[2].bank
    assert resumed.steps == whole.steps == [4, 6, 8]
    assert resumed.base.kind == kind
    for ours, theirs in zip(resumed, whole, strict=True):
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
        assert ours.own == {"net.2.weight", "net.2.bias"}
    if where == "disk":
        files = [{f.name for f in p.glob("*.safetensors")} for p in (tmp_path / "whole", tmp_path / "bank")]
        assert files[0] == files[1], "equal banks are equal files, the base among them"


def test_a_layer_that_is_thawed_in_the_run_goes_into_its_samples(tmp_path):
    from lightning.pytorch.callbacks import Callback

    class Moves(Callback):
        def on_train_batch_start(self, trainer, module, *args):
            if trainer.global_step == 5:
                with torch.no_grad():
                    module.net[0].weight.add_(0.5)

    before = classifier().net[0].weight.detach().clone()
    _, _, collector = fit(tmp_path, "stored", Moves())
    module = copy.deepcopy(classifier())
    for index, moved in ((0, 0.0), (1, 0.5)):
        collector.bank.load_into(module, index)
        assert torch.equal(module.net[0].weight, before + moved)


def on_two_ranks(folder):
    """Fit, save, resume, evaluate: what the bank holds and its scores, with each kind."""
    found = {}
    for kind in KINDS:
        _, trainer, _ = fit(folder / kind, kind, ranks=2, steps=4)
        trainer.save_checkpoint(folder / f"{kind}.ckpt")
        module, _, _ = fit(folder / kind, kind, ranks=2, resume=folder / f"{kind}.ckpt")
        tester = make_trainer(callbacks=[EnsembleEvaluation(folder / kind)], logger=False, devices=2, strategy="ddp")
        (scores,) = tester.test(module, SyntheticData(), verbose=False)
        bank = SampleBank.open(folder / kind)
        found[kind] = bank.steps, [sorted(sample.own) for sample in bank], scores["ensemble/nll"]
    return found


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks(tmp_path):
    first, second = run_ranks(on_two_ranks, tmp_path, timeout=300)
    assert first == second
    assert first["stored"] == first["reference"]
    assert first["stored"][:2] == ([4, 6, 8], [["net.2.bias", "net.2.weight"]] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_chains_share_one_base(tmp_path, kind):
    """What each chain sends is its sample; its frozen weights are those that the bank has."""
    bank = SampleBank(tmp_path, base=kind)
    for chain in range(2):
        alone = SampleBank()
        alone.add(fit(None, "stored")[0], step=8, chain=chain)
        other = SampleBank()
        other.load_state_dict(alone.state_dict())
        bank.merge(other)
    assert [sample.own for sample in bank] == [{"net.2.weight", "net.2.bias"}] * 2
    assert bank.base.kind == kind
