"""The Bayesian model average: equal to the naive one, one sample in memory, weights put back whatever happens."""

import copy
import gc
import weakref
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.metrics import CalibrationError, brier_score, categorical_nll
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.predictive import (
    PosteriorPredictive,
    bayesian_model_average,
    default_inputs,
    default_targets,
    probabilities_of,
    refresh_batch_norm,
    swapped_weights,
)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3)
    )


def bank_of(count, path=None):
    bank, net = SampleBank(path), network()
    generator = torch.Generator().manual_seed(11)
    for step in range(count):
        with torch.no_grad():
            for param in net.parameters():
                param.copy_(quantize(torch.randn(param.shape, generator=generator) * 0.3, "bfp8", rounding="nearest"))
            for name, buffer in net.named_buffers():
                if "running" in name:
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        bank.add(net, step=step, formats="bfp8")
    return bank


def data(batches=3, size=5):
    generator = torch.Generator().manual_seed(12)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(batches)
    ]


def state_of(module):
    """Everything that must be as it was: bits, modes, momenta, gradients."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    modes = [(m.training, getattr(m, "momentum", None)) for m in module.modules()]
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, modes


def assert_same_state(module, state):
    now = state_of(module)
    assert now[1] == state[1]
    assert now[0].keys() == state[0].keys()
    assert all(torch.equal(now[0][name], value) for name, value in state[0].items())


def naive_average(bank, batches):
    """Load every state dict into a module of its own, keep all probabilities, average at the end."""
    members = []
    for sample in bank:
        member = network()
        member.load_state_dict(sample.state_dict())
        member.eval()
        with torch.no_grad():
            members.append(torch.cat([member(x).softmax(1) for x, _ in batches]).double())
    return members


@pytest.mark.parametrize("durable", [False, True])
def test_equals_the_naive_average(tmp_path, durable):
    """Bit for bit: the same softmax in float32, added in the same order in float64."""
    bank, batches = bank_of(4, tmp_path / "bank" if durable else None), data()
    members = naive_average(bank, batches)
    total = torch.zeros_like(members[0])
    for member in members:
        total += member
    result = bayesian_model_average(bank, network(), batches)
    assert torch.equal(result.predictive.probabilities, total / 4)
    assert torch.equal(result.predictive.targets, torch.cat([y for _, y in batches]))
    assert len(result.predictive) == 15


def test_scores_of_every_sample_and_of_the_growing_ensemble():
    bank, batches = bank_of(3), data()
    members, targets = naive_average(bank, batches), torch.cat([y for _, y in batches])
    seen = []
    result = bayesian_model_average(bank, network(), batches, on_sample=seen.append)
    assert seen == result.history
    assert [r.info.step for r in result.history] == [0, 1, 2]
    assert result.scores == result.history[-1].ensemble
    for k, scored in enumerate(result.history):
        mean = torch.stack(members[: k + 1]).sum(0) / (k + 1)
        for scores, probabilities in ((scored.sample, members[k]), (scored.ensemble, mean)):
            hits = (probabilities.argmax(1) == targets).double().mean().item()
            ece = CalibrationError()
            ece.update(probabilities, targets)
            # the same sums over 15 points, once in three batches and once in one; torchmetrics' accuracy is float32
            rounding = (15 + 8) * 2.0**-52
            assert scores["accuracy"] == pytest.approx(hits, rel=2.0**-23)
            assert scores["nll"] == pytest.approx(categorical_nll(probabilities, targets).item(), rel=rounding)
            assert scores["brier"] == pytest.approx(brier_score(probabilities, targets).item(), rel=rounding)
            assert scores["ece"] == pytest.approx(ece.compute().item(), rel=0, abs=rounding)


def tensor_bytes():
    """Bytes of all tensors alive, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]  # none is fake
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_one_sample_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """At every forward: no stored sample is still held, and what was added is a copy of the weights and the sums."""
    bank, batches, net = bank_of(5, tmp_path / "bank"), data(batches=2), network()
    alive, read = [], SampleBank._read

    def tracked(self, record):
        sample = read(self, record)
        alive.append(weakref.ref(sample))
        return sample

    monkeypatch.setattr(SampleBank, "_read", tracked)
    counts, peaks = [], []

    def logits(module, batch):
        counts.append(sum(ref() is not None for ref in alive))
        if len(counts) % 3 == 1:  # in samples 1, 2, 4 and 5; counting takes its time
            peaks.append(tensor_bytes())
        return module(batch[0])

    before = tensor_bytes()
    bayesian_model_average(bank, net, batches, logits=logits, metrics=None)
    assert len(alive) == 5
    assert counts == [0] * 10
    weights = sum(t.untyped_storage().nbytes() for t in (*net.parameters(), *net.buffers()))
    sums = 10 * 3 * 8 + 10 * 8 + 10 * 8 + 10 * 3 * 2  # probabilities, entropies, targets and votes of ten points
    last_batch = 5 * 3 * 4
    assert len(peaks) == 4
    assert max(peaks) - before <= weights + sums + last_batch


def failing(when):
    calls = []

    def logits(module, batch):
        calls.append(1)
        if len(calls) == when:
            raise RuntimeError("on purpose")
        return module(batch[0])

    return logits


@pytest.mark.parametrize("when", [1, 4, 9, None])
@pytest.mark.parametrize("refresh", [False, True])
def test_weights_and_modes_are_put_back(when, refresh):
    """Bits of parameters and buffers, training flags (mixed ones too) and momenta, with and without an exception."""
    bank, net = bank_of(3), network()
    net.train()
    net[2].eval()
    net[1].momentum = 0.3
    before, identities = state_of(net), [id(p) for p in net.parameters()]
    options = {"refresh_batch_norm": data(2) if refresh else None, "logits": failing(when)}
    if when is None:
        bayesian_model_average(bank, net, data(), **options)
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            bayesian_model_average(bank, net, data(), **options)
    assert_same_state(net, before)
    assert [id(p) for p in net.parameters()] == identities


def test_weights_are_put_back_when_the_listener_raises():
    net = network()
    before = state_of(net)

    def listener(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bayesian_model_average(bank_of(2), net, data(), on_sample=listener)
    assert_same_state(net, before)


def test_weights_are_put_back_when_a_sample_is_damaged(tmp_path):
    bank, net = bank_of(3, tmp_path / "bank"), network()
    before = state_of(net)
    next((tmp_path / "bank").glob("*-s1-*")).unlink()
    with pytest.raises(BankError, match="is missing"):
        bayesian_model_average(bank, net, data())
    assert_same_state(net, before)


def test_tied_weights_and_scratch_buffers_are_put_back():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net.register_buffer("scratch", torch.ones(2), persistent=False)
    before = state_of(net)
    with pytest.raises(ZeroDivisionError), swapped_weights(net):  # noqa: PT012
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.data.fill_(7.0)
        net.eval()
        raise ZeroDivisionError
    assert_same_state(net, before)
    assert net[1].weight is net[0].weight


def test_batch_norm_is_refreshed_for_every_sample():
    """The average with refresh is the naive one over members whose BatchNorm layer saw the batches itself."""
    bank, batches, training = bank_of(3), data(), data(batches=4)
    total = torch.zeros(15, 3, dtype=torch.float64)
    for sample in bank:
        member = network()
        member.load_state_dict(sample.state_dict())
        member[1].reset_running_stats()
        member[1].momentum = None
        with torch.no_grad():
            for x, _ in training:
                member[1](member[0](x))
        member.eval()
        with torch.no_grad():
            total += torch.cat([member(x).softmax(1) for x, _ in batches]).double()
    result = bayesian_model_average(bank, network(), batches, refresh_batch_norm=training)
    assert torch.equal(result.predictive.probabilities, total / 3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (DataLoader(TensorDataset(*data(1, 60)[0]), 20, shuffle=True), "same batches"),
        ((batch for batch in data()), "can be iterated more than once"),
        ([], "and not none"),
    ],
    ids=["shuffled", "generator", "empty"],
)
def test_batches_that_change_are_refused(batches, message):
    """60 targets of three classes: a shuffle that leaves them in order has probability below 1e-20."""
    with pytest.raises(ValueError, match=message):
        bayesian_model_average(bank_of(2), network(), batches)


def test_an_empty_bank_is_refused():
    with pytest.raises(ValueError, match="holds no usable sample"):
        bayesian_model_average(SampleBank(), network(), data())


def test_another_module_is_refused():
    with pytest.raises(BankError, match="not the one that was sampled"):
        bayesian_model_average(bank_of(1), nn.Linear(2, 2), data())


def test_mappings_and_functions_as_batches():
    bank, batches = bank_of(2), data()
    wanted = bayesian_model_average(bank, network(), batches)
    named = bayesian_model_average(bank, network(), [{"image": x, "label": y} for x, y in batches])
    custom = bayesian_model_average(
        bank,
        network(),
        [{"pixels": x, "truth": y} for x, y in batches],
        logits=lambda module, batch: module(batch["pixels"]),
        targets=lambda batch: batch["truth"],
    )
    for other in (named, custom):
        assert torch.equal(other.predictive.probabilities, wanted.predictive.probabilities)
        assert other.scores == wanted.scores


def test_without_targets_there_are_predictions_but_no_scores():
    bank, batches = bank_of(2), data()
    result = bayesian_model_average(bank, network(), [x for x, _ in batches])
    assert torch.equal(
        result.predictive.probabilities, bayesian_model_average(bank, network(), batches).predictive.probabilities
    )
    assert result.scores == {}
    assert result.predictive.targets is None


def test_usual_shapes_of_batches():
    x, y = torch.zeros(2), torch.ones(2)
    pair = namedtuple("pair", "inputs targets")(x, y)
    for batch in ((x, y), [x, y], pair, {"x": x, "y": y}, {"inputs": x, "labels": y}):
        assert default_inputs(batch) is x
        assert default_targets(batch) is y
    assert default_inputs(x) is x
    assert default_targets(x) is None
    assert default_targets((x,)) is None
    with pytest.raises(ValueError, match=r"No inputs among the keys \['pixels'\]"):
        default_inputs({"pixels": x})


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"Logits must have shape \(n, classes\)"):
        probabilities_of(torch.zeros(shape))


def test_softmax_is_taken_in_float32_or_wider():
    assert probabilities_of(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert probabilities_of(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_uncertainties_add_up():
    """Total = aleatoric + epistemic; equal members have no epistemic part, disagreeing sure ones nothing else."""
    generator = torch.Generator().manual_seed(13)
    members = [(torch.randn(50, 4, generator=generator) * 3).softmax(1) for _ in range(5)]
    predictive = PosteriorPredictive()
    for member in members:
        predictive.update(0, member[:20])
        predictive.update(1, member[20:])
        predictive.end_sample()
    mean = torch.stack(members).double().mean(0)
    torch.testing.assert_close(predictive.probabilities, mean, rtol=1e-15, atol=0)
    entropies = torch.stack([torch.distributions.Categorical(m.double()).entropy() for m in members]).mean(0)
    torch.testing.assert_close(predictive.expected_entropy, entropies, rtol=1e-6, atol=0)  # theirs clamps at 1e-7
    parts = predictive.expected_entropy + predictive.mutual_information
    torch.testing.assert_close(parts, predictive.predictive_entropy, rtol=1e-14, atol=0)
    same = PosteriorPredictive()
    for _ in range(3):
        same.update(0, members[0])
        same.end_sample()
    assert same.mutual_information.max() <= 1e-14


def test_float32_sums_are_on_request():
    predictive = PosteriorPredictive(dtype=torch.float32, device="cpu")
    bayesian_model_average(bank_of(2), network(), data(), predictive=predictive)
    assert predictive.probabilities.dtype == torch.float32
    with pytest.raises(ValueError, match=r"must be torch\.float32 or torch\.float64"):
        PosteriorPredictive(dtype=torch.float16)


def test_batch_order_is_checked():
    predictive = PosteriorPredictive()
    with pytest.raises(ValueError, match="Batch 0 of a sample must come next, got 1"):
        predictive.update(1, torch.ones(1, 2))


def test_refresh_measures_plain_averages():
    """Two batches of two points with dyadic values: means and unbiased variances are exact."""
    layer = nn.BatchNorm1d(1, momentum=0.1)
    batches = [torch.tensor([[1.0], [3.0]]), (torch.tensor([[4.0], [8.0]]), "ignored")]
    assert refresh_batch_norm(layer, batches) == 1
    assert layer.running_mean.item() == (2.0 + 6.0) / 2
    assert layer.running_var.item() == (2.0 + 8.0) / 2
    assert layer.momentum == 0.1


def test_refresh_leaves_dropout_off_and_modes_alone():
    """Dropout before the BatchNorm layer would change what is measured; the flags are as before."""
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(2)).train()
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    refresh_batch_norm(net, [x])
    assert net[1].running_mean.tolist() == [2.0, 4.0]
    assert net.training
    assert net[0].training
    frozen = copy.deepcopy(net).eval()
    refresh_batch_norm(frozen, [{"x": x}])
    assert not any(part.training for part in frozen.modules())


def test_refresh_without_batch_norm_does_not_touch_the_data():
    def explode():
        raise AssertionError
        yield

    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert refresh_batch_norm(net, explode()) == 0


def test_refresh_without_data_is_refused_and_changes_nothing():
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(3.0)
    with pytest.raises(ValueError, match="got no batch"):
        refresh_batch_norm(layer, [])
    assert layer.running_mean.item() == 3.0
    assert layer.momentum == 0.1
    assert layer.training
