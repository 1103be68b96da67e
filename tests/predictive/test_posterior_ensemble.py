"""The posterior predictive as a module: equal to the naive average either way, exact sets, saved state."""

import types

import numpy as np
import pytest
import torch
from helpers import stats
from torch import nn

from lightning_lpsgld import PosteriorEnsemble
from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.metrics import entropy
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.predictive import (
    Multiclass,
    Regression,
    class_scores,
    conformal_quantile,
    refresh_batch_norm,
)


def classifier():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3)
    ).double()


def bank_of(net, count=4, path=None, formats="bfp8"):
    bank, generator = SampleBank(path), torch.Generator().manual_seed(11)
    for step in range(count):
        with torch.no_grad():
            for param in net.parameters():
                noise = torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.3
                param.copy_(quantize(noise.to(param.dtype), "bfp8", rounding="nearest"))
            for name, buffer in net.named_buffers():
                if "running" in name:
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        bank.add(net, step=step, formats=formats)
    return bank


def images(n=7, seed=12):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(bank, build, inputs):
    """Outputs of K modules of their own, shape (K, n, ...)."""
    rows = []
    for sample in bank:
        member = build()
        member.load_state_dict(sample.state_dict())
        member.eval()
        with torch.no_grad():
            rows.append(member(inputs))
    return torch.stack(rows)


def state_of(module):
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {n: t.detach().clone() for n, t in tensors.items()}, [m.training for m in module.modules()]


@pytest.mark.parametrize("members", ["stacked", "streamed", "auto"])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_equals_the_naive_average(members, chunk):
    """All sums in float64 over a float64 net, so that the order of products is all that can differ: 1e-12."""
    bank, net = bank_of(classifier()), classifier()
    before, modes = state_of(net)
    ensemble = PosteriorEnsemble.from_bank(net, bank, members=members, chunk=chunk)
    got = ensemble((images(), torch.zeros(7)))
    p = naive(bank, classifier, images()).softmax(2)
    expected = entropy(p).mean(0)
    torch.testing.assert_close(got.mean, p.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.predictive_entropy, entropy(p.mean(0)), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.expected_entropy, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.mutual_information, entropy(p.mean(0)) - expected, rtol=0, atol=1e-12)
    assert got.sets is None
    assert torch.equal(got.labels, p.mean(0).argmax(1))
    assert ensemble.how == ("streamed" if members == "streamed" else "stacked")
    after, modes_after = state_of(net)
    assert modes == modes_after
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_streams_what_does_not_fit():
    bank = bank_of(classifier())
    limit = bank.nbytes_fp32
    assert PosteriorEnsemble(classifier(), bank, memory_limit=limit).how == "stacked"
    assert PosteriorEnsemble(classifier(), bank, memory_limit=limit - 1).how == "streamed"


class Branching(nn.Module):
    """Asks for a value of a tensor, which vmap cannot give."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 2).double()

    def forward(self, x):
        out = self.linear(x)
        return out if out.sum().item() > 0 else -out


def test_streams_what_cannot_be_vectorized():
    bank = bank_of(Branching())
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ensemble = PosteriorEnsemble(Branching(), bank)
    assert ensemble.how == "stacked"
    got = ensemble(x)
    assert ensemble.how == "streamed"
    assert torch.equal(got.mean, naive(bank, Branching, x).softmax(2).mean(0))
    with pytest.raises(RuntimeError):
        PosteriorEnsemble(Branching(), bank, members="stacked")(x)


def test_a_wrong_batch_does_not_end_stacking():
    ensemble = PosteriorEnsemble(classifier(), bank_of(classifier()))
    with pytest.raises(RuntimeError):
        ensemble(torch.zeros(2, 5, dtype=torch.float64))
    assert ensemble.how == "stacked"
    assert ensemble(images()).mean.shape == (7, 3)


@pytest.mark.parametrize("durable", [False, True])
def test_from_a_path_and_from_disk(tmp_path, durable):
    bank = bank_of(classifier(), path=tmp_path / "bank")
    ensemble = PosteriorEnsemble.from_bank(classifier(), tmp_path / "bank", in_memory=not durable, members="streamed")
    expected = PosteriorEnsemble.from_bank(classifier(), bank, members="streamed")(images()).mean
    assert torch.equal(ensemble(images()).mean, expected)
    assert (ensemble.bank.path is None) == (not durable)


@pytest.mark.parametrize("members", ["stacked", "streamed"])
def test_batch_norm_is_refreshed_per_member(members):
    bank, training = bank_of(classifier()), [(images(20, 5), None), (images(20, 6), None)]
    ensemble = PosteriorEnsemble.from_bank(classifier(), bank, refresh_batch_norm=training, members=members)
    rows = []
    for sample in bank:
        member = classifier()
        member.load_state_dict(sample.state_dict())
        refresh_batch_norm(member, training)
        member.eval()
        with torch.no_grad():
            rows.append(member(images()).softmax(1))
    torch.testing.assert_close(ensemble(images()).mean, torch.stack(rows).mean(0), rtol=0, atol=1e-12)
    stored = PosteriorEnsemble.from_bank(classifier(), bank, members=members)(images()).mean
    assert not torch.allclose(stored, torch.stack(rows).mean(0), atol=1e-3)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("members", ["stacked", "streamed"])
def test_tied_weights(members):
    bank, x = bank_of(Tied()), torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = PosteriorEnsemble(Tied(), bank, members=members)(x)
    torch.testing.assert_close(got.mean, naive(bank, Tied, x).softmax(2).mean(0), rtol=0, atol=1e-12)


class MeanAndVariance(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4).double()

    def forward(self, x):
        out = self.linear(x)
        return out[:, :2], out[:, 2:].exp()


def vectors(n, seed=3):
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_regression_splits_the_variance():
    bank = bank_of(MeanAndVariance())
    got = PosteriorEnsemble(MeanAndVariance(), bank)(vectors(6))
    rows = [MeanAndVariance() for _ in range(4)]
    for row, sample in zip(rows, bank):
        row.load_state_dict(sample.state_dict())
    with torch.no_grad():
        means = torch.stack([row(vectors(6))[0] for row in rows])
        noise = torch.stack([row(vectors(6))[1] for row in rows])
    torch.testing.assert_close(got.mean, means.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.epistemic, means.var(0, correction=0), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.aleatoric, noise.mean(0), rtol=0, atol=1e-12)
    assert torch.equal(got.variance, got.epistemic + got.aleatoric)


def test_regression_of_values_takes_the_noise():
    build = lambda: nn.Linear(3, 1).double()  # noqa: E731
    bank = bank_of(build())
    got = PosteriorEnsemble(build(), bank, task="regression", noise_std=0.5)(vectors(6))
    assert torch.equal(got.aleatoric, torch.full((6, 1), 0.25, dtype=torch.float64))
    with pytest.raises(ValueError, match="say task='binary', 'multilabel' or 'regression'"):
        PosteriorEnsemble(build(), bank)(vectors(6))


class Wrapped(nn.Module):
    """Gives what ``wrap`` makes of the output of a linear layer."""

    def __init__(self, wrap, outputs=4):
        super().__init__()
        self.linear, self.wrap = nn.Linear(3, outputs).double(), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


WRAPS = {
    "mapping": lambda out: {"loss": out.sum(), "logits": out},
    "object": lambda out: types.SimpleNamespace(loss=None, logits=out),
    "distribution": lambda out: torch.distributions.Categorical(logits=out),
}


@pytest.mark.parametrize("members", ["auto", "streamed"])
@pytest.mark.parametrize("name", WRAPS)
def test_logits_are_found_in_what_wraps_them(name, members):
    """As models of Hugging Face give them; what vmap does not know is streamed."""
    bank = bank_of(Wrapped(WRAPS[name]))
    got = PosteriorEnsemble(Wrapped(WRAPS[name]), bank, members=members)(vectors(6))
    plain = PosteriorEnsemble(Wrapped(lambda out: out), bank)(vectors(6))
    torch.testing.assert_close(got.mean, plain.mean, rtol=0, atol=1e-12)
    assert got.mean.shape == (6, 4)


def test_variances_by_name_and_by_task():
    named = lambda: Wrapped(lambda out: {"mean": out[:, :2], "log_variance": out[:, 2:]})  # noqa: E731
    bank = bank_of(named())
    got = PosteriorEnsemble(named(), bank)(vectors(6))
    halves = PosteriorEnsemble(Wrapped(lambda out: out), bank, task=Regression("mean_log_variance"))(vectors(6))
    pair = PosteriorEnsemble(Wrapped(lambda out: (out[:, :2], out[:, 2:].exp())), bank)(vectors(6))
    for other in (halves, pair):
        for part in ("mean", "epistemic", "aleatoric"):
            torch.testing.assert_close(getattr(got, part), getattr(other, part), rtol=1e-12, atol=1e-12)
    told = PosteriorEnsemble(Wrapped(lambda out: out), bank, task=Regression(noise_variance=0.3))(vectors(6))
    assert torch.equal(told.aleatoric, torch.full((6, 4), 0.3, dtype=torch.float64))


def test_classes_of_tokens_stand_last():
    last, x = Wrapped(lambda out: out), vectors(10).reshape(2, 5, 3)
    bank = bank_of(last)
    got = PosteriorEnsemble(Wrapped(lambda out: out), bank, task=Multiclass(class_dim=-1))(x)
    flat = PosteriorEnsemble(Wrapped(lambda out: out), bank)(x.reshape(10, 3))
    torch.testing.assert_close(got.mean, flat.mean.reshape(2, 5, 4).movedim(-1, 1), rtol=0, atol=1e-12)
    assert got.predictive_entropy.shape == (2, 5)


def test_infinite_logits_are_limits():
    sure = lambda: Wrapped(lambda out: torch.cat([torch.full_like(out[:, :1], torch.inf), out[:, 1:]], 1))  # noqa: E731
    got = PosteriorEnsemble(sure(), bank_of(sure()))(vectors(6))
    assert torch.equal(got.mean, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(6, 4))


def test_binary_and_multilabel():
    build = lambda: nn.Linear(3, 1).double()  # noqa: E731
    bank = bank_of(build())
    p = naive(bank, build, vectors(6)).sigmoid()[..., 0]
    got = PosteriorEnsemble(build(), bank, task="binary")(vectors(6))
    torch.testing.assert_close(got.mean, torch.stack([1 - p.mean(0), p.mean(0)], 1), rtol=0, atol=1e-12)
    wide = lambda: nn.Linear(3, 4).double()  # noqa: E731
    bank = bank_of(wide())
    p = naive(bank, wide, vectors(6)).sigmoid()
    ensemble = PosteriorEnsemble(wide(), bank, task="multilabel")
    got = ensemble(vectors(6))
    torch.testing.assert_close(got.mean, p.mean(0), rtol=0, atol=1e-12)
    assert got.predictive_entropy.shape == (6, 4)
    assert np.array_equal(ensemble.predict(vectors(6)), (p.mean(0) > 0.5).long().numpy())
    with pytest.raises(ValueError, match="prediction sets are for one class label a point"):
        ensemble.calibrate([(vectors(6), torch.zeros(6))])


def test_classes_per_pixel():
    build = lambda: nn.Conv2d(1, 3, 3, padding=1).double()  # noqa: E731
    bank = bank_of(build())
    got = PosteriorEnsemble(build(), bank)(images())
    p = naive(bank, build, images()).softmax(2)
    torch.testing.assert_close(got.mean, p.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.predictive_entropy, entropy(p.mean(0), dim=1), rtol=0, atol=1e-12)


def test_half_precision_gives_float32():
    net = nn.Linear(3, 2).bfloat16()
    bank = bank_of(net, formats=None)
    assert PosteriorEnsemble(nn.Linear(3, 2).bfloat16(), bank)(vectors(4).bfloat16()).mean.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- prediction sets


def test_the_quantile_is_the_right_order_statistic():
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0])
    assert [conformal_quantile(scores, c) for c in (0.1, 0.5, 0.9)] == [1.0, 5.0, 9.0]
    with pytest.raises(ValueError, match=r"9 held-out points cannot calibrate a coverage of 0.95; it takes 19"):
        conformal_quantile(scores, 0.95)
    with pytest.raises(ValueError, match=r"`coverage` must be in \(0, 1\), got 1.0"):
        conformal_quantile(scores, 1.0)
    with pytest.raises(ValueError, match="without NaN"):
        conformal_quantile(torch.tensor([1.0, float("nan")]), 0.5)


def test_coverage_is_that_of_the_theorem():
    """n = 19 held-out points, c = 0.9: the 18th smallest, so a new point is covered with probability 18/20 exactly.

    Blind spot: an error of less than ``detect`` = 0.01; the order statistics next to it are off by 0.05.
    """
    draws = stats.draws_for_means(0.01)
    points = torch.rand(draws, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bound = points[:, :19].sort(1).values[:, 17]
    one = [conformal_quantile(row[:19], 0.9) for row in points[:50]]
    assert one == bound[:50].tolist()
    covered = (points[:, 19] <= bound).double()
    stats.assert_means_equal(covered, 0.9, width=1.0, detect=0.01)


def test_scores_of_classes():
    p = torch.tensor([[0.2, 0.5, 0.3]])
    torch.testing.assert_close(class_scores(p, "threshold"), torch.tensor([[0.8, 0.5, 0.7]]).double())
    torch.testing.assert_close(class_scores(p, "adaptive"), torch.tensor([[1.0, 0.5, 0.8]]).double())
    with pytest.raises(ValueError, match="'threshold' or 'adaptive', got 'raps'"):
        class_scores(p, "raps")


@pytest.mark.parametrize("score", ["threshold", "adaptive"])
def test_sets_hold_the_held_out_share(score):
    """On the held-out points themselves at least ceil((n+1)c)/n are covered: an order statistic, no chance in it."""
    bank, ensemble = bank_of(classifier()), PosteriorEnsemble(classifier(), bank_of(classifier()))
    assert len(bank) == 4
    x = images(49, seed=7)
    y = torch.randint(3, (49,), generator=torch.Generator().manual_seed(8))
    ensemble.calibrate([(x[:30], y[:30]), (x[30:], y[30:])], coverage=0.8, score=score)
    sets = ensemble(x).sets
    assert int(sets.gather(1, y[:, None]).sum()) >= 40
    assert bool(sets.any(1).all())
    assert 1.0 < float(sets.double().sum(1).mean()) < 3.0


def test_intervals_of_a_regression():
    ensemble = PosteriorEnsemble(MeanAndVariance(), bank_of(MeanAndVariance()))
    x, y = vectors(39), torch.randn(39, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    quantile = ensemble.calibrate([(x, y)], coverage=0.75)
    got = ensemble(x)
    inside = ((got.lower <= y) & (y <= got.upper)).all(1)
    assert int(inside.sum()) in (30, 31)  # the 30th smallest score of 39; its own bound may be lost to rounding
    torch.testing.assert_close(got.upper - got.mean, quantile * got.variance.sqrt())


def test_calibration_refuses():
    ensemble = PosteriorEnsemble(classifier(), bank_of(classifier()))
    with pytest.raises(ValueError, match="a batch has no targets"):
        ensemble.calibrate([images()])
    with pytest.raises(ValueError, match="no batch of held-out data"):
        ensemble.calibrate([])
    silent = PosteriorEnsemble(nn.Linear(3, 1).double(), bank_of(nn.Linear(3, 1).double(), count=1), task="regression")
    with pytest.raises(ValueError, match="variance is not > 0; give the ensemble a `noise_std`"):
        silent.calibrate([(vectors(5), torch.zeros(5, 1, dtype=torch.float64))])


# -------------------------------------------------------------------------------------------------- arrays, state, bad


def test_plain_arrays():
    ensemble = PosteriorEnsemble(classifier().float(), bank_of(classifier().float()))
    x = images(7).numpy()
    proba = ensemble.predict_proba(x, batch_size=3)
    assert (proba.dtype, proba.shape) == (np.float64, (7, 3))
    assert np.allclose(proba.sum(1), 1.0, rtol=0, atol=1e-15)
    assert np.allclose(proba, ensemble(images(7).float()).mean.numpy(), rtol=0, atol=2e-6)
    assert np.array_equal(ensemble.predict(x), proba.argmax(1))
    with pytest.raises(ValueError, match="needs rows and batch_size >= 1, got 0"):
        ensemble.predict_proba(x[:0])
    regression = PosteriorEnsemble(MeanAndVariance(), bank_of(MeanAndVariance()))
    assert regression.predict(vectors(5).numpy()).shape == (5, 2)
    with pytest.raises(TypeError, match="use predict"):
        regression.predict_proba(vectors(5))


@pytest.mark.parametrize("members", ["stacked", "streamed"])
def test_saved_and_loaded(tmp_path, members):
    y = torch.randint(3, (49,), generator=torch.Generator().manual_seed(8))
    first = PosteriorEnsemble.from_bank(classifier(), bank_of(classifier()), members=members)
    first.refresh_batch_norm([images(20, 5)])
    first.calibrate([(images(49, 7), y)], coverage=0.8, score="adaptive")
    torch.save(first.state_dict(), tmp_path / "ensemble.pt")
    other = bank_of(classifier(), count=2)
    second = PosteriorEnsemble.from_bank(classifier(), other, members=members)
    second.load_state_dict(torch.load(tmp_path / "ensemble.pt", weights_only=True))
    a, b = first(images()).tensors(), second(images()).tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(second) == 4


def test_disk_members_cannot_be_saved(tmp_path):
    bank_of(classifier(), path=tmp_path / "bank")
    ensemble = PosteriorEnsemble.from_bank(classifier(), tmp_path / "bank", in_memory=False)
    with pytest.raises(RuntimeError, match="build it with in_memory=True"):
        ensemble.state_dict()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="has no usable sample"):
        PosteriorEnsemble(classifier(), SampleBank())
    with pytest.raises(BankError, match="There is no sample bank at"):
        PosteriorEnsemble.from_bank(classifier(), tmp_path / "nothing")
    with pytest.raises(BankError, match="not the one that was sampled"):
        PosteriorEnsemble(nn.Linear(2, 2).double(), bank_of(classifier()))
    bank = bank_of(classifier())
    for options, message in (
        ({"task": "ranking"}, "`task` must be 'auto'"),
        ({"members": "all"}, "`members` must be"),
        ({"noise_std": -1.0}, "`noise_std` must be finite"),
        ({"chunk": 0}, "`chunk` must be an int >= 1"),
        ({"memory_limit": True}, "`memory_limit` must be an int >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PosteriorEnsemble(classifier(), bank, **options)
    with pytest.raises(TypeError, match="the module gave dict"):
        PosteriorEnsemble(classifier(), bank, forward=lambda m, b: {"boxes": m(b)})(images())
