"""Every task against a loop that shares nothing with the package: scipy, torchmetrics, torch's losses."""

import math
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MultilabelAccuracy

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.predictive import (
    Binary,
    GaussianOutput,
    Multiclass,
    NonFinitePredictionError,
    Regression,
    TaskReader,
    bayesian_model_average,
    decide_task,
    diversity_verdict,
    probabilities_of,
    read_output,
)


class Net(nn.Module):
    """A linear layer whose output is put into a form by ``shape``."""

    def __init__(self, width, shape=lambda out: out):
        super().__init__()
        self.layer, self.shape = nn.Linear(4, width), shape

    def forward(self, x):
        return self.shape(self.layer(x))


def bank_of(net, samples=3, scale=1.0):
    bank, generator = SampleBank(), torch.Generator().manual_seed(1)
    for step in range(samples):
        with torch.no_grad():
            for param in net.parameters():
                param.copy_(scale * torch.randn(param.shape, generator=generator))
        bank.add(net, step=step)
    return bank


def inputs(count=24, seed=2):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(bank, net, x):
    """What each sample gives, first dim the samples."""
    found = []
    for index in range(len(bank)):
        bank.load_into(net, index)
        found.append(net(x))
    return torch.stack(found).double()


def average(net, bank, x, targets, **options):
    batches = [(x[:10], targets[:10]), (x[10:], targets[10:])]
    return bayesian_model_average(bank, net, batches, **options)


def labels(high, *shape, seed=3):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- classes


def dense(out):
    """(batch, 3, 2, 2) from (batch, 12)."""
    return out.view(-1, 3, 2, 2)


def tokens(out):
    """(batch, 4, 3) from (batch, 12)."""
    return out.view(-1, 4, 3)


@pytest.mark.parametrize("ignored", [None, 255])
@pytest.mark.parametrize(("shape", "places"), [(dense, (2, 2)), (tokens, (4,))])
def test_pixels_and_tokens(shape, places, ignored):
    """Scores are those of torch and torchmetrics on mean probabilities, without what is ignored."""
    net, x = Net(12, shape), inputs()
    bank, targets = bank_of(net), labels(3, 24, *places)
    mark = -100 if ignored is None else ignored
    targets[labels(4, 24, *places, seed=4) == 0] = mark
    result = average(net, bank, x, targets, ignore_index=ignored)
    assert result.task.name == "multiclass"
    class_dim = 2 if shape is dense else -1
    probabilities = outputs(bank, net, x).softmax(class_dim).mean(0).movedim(class_dim - (class_dim > 0), 1)
    nll = functional.nll_loss(probabilities.log(), targets, ignore_index=mark)
    assert result.scores["nll"] == pytest.approx(nll.item(), rel=1e-6)
    accuracy = MulticlassAccuracy(3, average="micro", ignore_index=mark)
    accuracy.update(probabilities, targets)
    assert result.scores["accuracy"] == pytest.approx(accuracy.compute().item(), abs=1e-6)
    assert len(result.predictive) == (targets != mark).sum()


def test_where_both_dims_fit_the_second_holds_the_classes():
    """As in ``cross_entropy``; ``class_dim`` says otherwise."""
    logits, targets = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0)), labels(3, 5, 3)
    first = TaskReader().read(logits, targets)[0]
    torch.testing.assert_close(first, logits.movedim(1, -1).softmax(-1).reshape(-1, 3))
    last = TaskReader(Multiclass(class_dim=-1)).read(logits, targets)[0]
    torch.testing.assert_close(last, logits.softmax(-1).reshape(-1, 3))


def test_what_is_found_first_holds_for_later_batches():
    """A batch of as many tokens as classes is read like those before it."""
    reader = TaskReader()
    reader.read(torch.zeros(2, 5, 3), labels(3, 2, 5))
    logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reader.read(logits, labels(3, 2, 3))[0], logits.softmax(-1).reshape(-1, 3))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets(smoothing):
    """Mixup and label smoothing: the loss of torch on distributions over classes."""
    net, x = Net(3), inputs()
    bank, generator = bank_of(net), torch.Generator().manual_seed(5)
    share = torch.rand(24, 1, generator=generator)
    mixed = share * functional.one_hot(labels(3, 24), 3) + (1 - share) * functional.one_hot(labels(3, 24, seed=6), 3)
    targets = (1 - smoothing) * mixed + smoothing / 3
    result = average(net, bank, x, targets)
    assert result.task.name == "multiclass"
    mean = outputs(bank, net, x).softmax(-1).mean(0)
    assert result.scores["nll"] == pytest.approx(
        functional.cross_entropy(mean.log(), targets.double()).item(), rel=1e-6
    )
    brier = (mean - targets).square().sum(1).mean()
    assert result.scores["brier"] == pytest.approx(brier.item(), rel=1e-6)


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("shape", [lambda out: out, lambda out: out[:, 0]])
def test_one_logit(shape, floating):
    net, x = Net(1, shape), inputs()
    bank, targets = bank_of(net), labels(2, 24)
    result = average(net, bank, x, targets.float() if floating else targets)
    assert result.task.name == "binary"
    mean = outputs(bank, net, x).sigmoid().mean(0).reshape(-1)
    nll = functional.binary_cross_entropy(mean, targets.double())
    assert result.scores["nll"] == pytest.approx(nll.item(), rel=1e-6)
    accuracy = BinaryAccuracy()
    accuracy.update(mean, targets)
    assert result.scores["accuracy"] == pytest.approx(accuracy.compute().item(), abs=1e-6)
    torch.testing.assert_close(result.predictive.probabilities[:, 1], mean, rtol=1e-5, atol=1e-7)


def test_several_labels():
    net, x = Net(5), inputs()
    bank, targets = bank_of(net), labels(2, 24, 5)
    targets[0, 0] = -100
    result = average(net, bank, x, targets)
    assert result.task.name == "multilabel"
    mean, counted = outputs(bank, net, x).sigmoid().mean(0), targets != -100
    nll = functional.binary_cross_entropy(mean[counted], targets[counted].double())
    assert result.scores["nll"] == pytest.approx(nll.item(), rel=1e-6)
    accuracy = MultilabelAccuracy(5, average="micro", ignore_index=-100)
    accuracy.update(mean, targets)
    assert result.scores["accuracy"] == pytest.approx(accuracy.compute().item(), abs=1e-6)


def test_disagreement_and_ambiguity_of_the_average():
    net, x, targets = Net(3), inputs(), labels(3, 24)
    bank = bank_of(net, 4)
    result = average(net, bank, x, targets)
    members = outputs(bank, net, x).softmax(-1)
    predicted = members.argmax(-1)
    pairs = [(predicted[i] != predicted[j]).double().mean() for i in range(4) for j in range(4) if i != j]
    further = result.further_scores()
    assert further["disagreement"] == pytest.approx(float(sum(pairs)) / 12)
    nll = [functional.nll_loss(p.log(), targets).item() for p in (*members, members.mean(0))]
    assert result.ambiguity == pytest.approx(sum(nll[:4]) / 4 - nll[4], abs=1e-6)
    entropies = stats.entropy(members.mean(0).numpy(), axis=1) - stats.entropy(members.numpy(), axis=2).mean(0)
    assert further["mutual_information"] == pytest.approx(entropies.mean(), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- regression


def check_regression(result, means, variances, targets):
    """Scores of a mixture from scipy alone, point by point."""
    means, stds, y = means.numpy(), np.sqrt(variances.numpy()), targets.double().numpy()
    density = stats.norm.pdf(y, means, stds).mean(0)
    pit = stats.norm.cdf(y, means, stds).mean(0)
    expected = {
        "rmse": math.sqrt(((means.mean(0) - y) ** 2).mean()),
        "nll": -np.log(density).mean(),
        "coverage_90": ((pit >= 0.05) & (pit <= 0.95)).mean(),
        "epistemic": means.var(0).mean(),
        "aleatoric": (stds**2).mean(),
    }
    for name, value in expected.items():
        assert result.scores[name] == pytest.approx(value, rel=1e-5), name
    assert result.further_scores().keys() == {"width_50", "width_90", "width_95", "quantile_error"}


@pytest.mark.filterwarnings("ignore:Predictions are means")
@pytest.mark.parametrize("noise", [None, 0.3])
def test_a_mean_with_assumed_noise(noise):
    net, x = Net(1), inputs()
    bank, targets = bank_of(net), torch.randn(24, generator=torch.Generator().manual_seed(8))
    task = "auto" if noise is None else Regression(noise_variance=noise)
    result = average(net, bank, x, targets, task=task)
    means = outputs(bank, net, x)[..., 0]
    check_regression(result, means, torch.full_like(means, 0.5 if noise is None else noise), targets)


def test_the_noise_that_is_assumed_is_said_once():
    said = []
    reader = TaskReader(say=said.append)
    for _ in range(2):
        reader.read(torch.zeros(3, 1), torch.tensor([0.1, 2.0, 3.0]))
    assert len(said) == 1
    assert "noise of variance 0.5" in said[0]
    TaskReader(Regression(noise_variance=1.0), say=said.append).read(torch.zeros(1), torch.zeros(1))
    assert len(said) == 1


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        (lambda out: {"mean": out[:, :1], "variance": out[:, 1:].exp()}, "auto"),
        (lambda out: {"mean": out[:, :1], "log_variance": out[:, 1:]}, "auto"),
        (lambda out: SimpleNamespace(loc=out[:, :1], scale=(0.5 * out[:, 1:]).exp()), "auto"),
        (lambda out: torch.distributions.Normal(out[:, :1], (0.5 * out[:, 1:]).exp()), "auto"),
        (lambda out: (out[:, :1], out[:, 1:]), "mean_log_variance"),
        (lambda out: (out[:, :1], out[:, 1:].exp()), "mean_variance"),
        (lambda out: out, "mean_log_variance"),
    ],
    ids=["variance", "log", "scale", "normal", "pair-log", "pair", "halves"],
)
def test_a_mean_and_its_variance(shape, form):
    net, x = Net(2, shape), inputs()
    bank, targets = bank_of(net), torch.randn(24, 1, generator=torch.Generator().manual_seed(8))
    result = average(net, bank, x, targets, task=Regression(form))
    net.shape = lambda out: out
    raw = outputs(bank, net, x)
    check_regression(result, raw[..., 0], raw[..., 1].exp(), targets[:, 0])


def test_dense_regression_with_ignored_pixels():
    net, x = Net(4, lambda out: out.view(-1, 1, 2, 2)), inputs()
    bank, targets = bank_of(net), torch.randn(24, 1, 2, 2, generator=torch.Generator().manual_seed(8))
    targets[::2, :, 0] = -1.0
    result = average(net, bank, x, targets, task=Regression(noise_variance=0.4, ignore_index=-1))
    counted = targets != -1.0
    means = outputs(bank, net, x)[:, counted]
    check_regression(result, means, torch.full_like(means, 0.4), targets[counted])


def test_the_running_mixture_is_the_one_of_all_components():
    """Sums that grow sample by sample give the CRPS, widths and intervals of all components at once."""
    from lightning_lpsgld.metrics import mixture_points, mixture_quantile

    net, x = Net(2, lambda out: {"mean": out[:, :1], "log_variance": out[:, 1:]}), inputs()
    bank, targets = bank_of(net, 5), torch.randn(24, 1, generator=torch.Generator().manual_seed(8))
    result = average(net, bank, x, targets)
    net.shape = lambda out: out
    raw = outputs(bank, net, x)
    means, variances = raw[..., 0], raw[..., 1].exp()
    for k, point in enumerate(result.history, start=1):
        points = mixture_points(means[:k], variances[:k], targets[:, 0])
        assert point.ensemble["crps"] == pytest.approx(points.crps.mean().item(), rel=1e-5)
        assert point.ensemble["nll"] == pytest.approx(-points.log_density.mean().item(), rel=1e-5)
    low, high = result.predictive.interval(0.9)
    torch.testing.assert_close(low, mixture_quantile(0.05, means, variances), rtol=1e-5, atol=1e-5)
    assert result.further_scores()["width_90"] == pytest.approx((high - low).mean().item(), rel=1e-9)
    torch.testing.assert_close(
        result.predictive.variance, means.var(0, correction=0) + variances.mean(0), rtol=1e-5, atol=1e-6
    )


# -------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"logits": t, "loss": torch.tensor(1.0)},
        lambda t: SimpleNamespace(logits=t),
        lambda t: OrderedDict(logits=t),
        lambda t: torch.distributions.Categorical(logits=t.log_softmax(-1)),
    ],
)
def test_logits_are_found_in_what_wraps_them(wrap):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(read_output(wrap(logits)).softmax(-1), logits.softmax(-1))


class Keyword(nn.Module):
    """Takes its inputs by keyword and gives an object with ``logits``, as models of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(7, 3)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.layer(input_ids) * attention_mask[..., None])


def test_batches_of_a_tokenizer():
    net, ids = Keyword(), labels(7, 6, 5)
    bank, targets = bank_of(net), labels(3, 6, 5)
    targets[:, -1] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones(6, 5), "labels": targets}
    result = bayesian_model_average(bank, net, [batch])
    members = []
    for index in range(len(bank)):
        bank.load_into(net, index)
        members.append(net.layer(ids).detach().double().softmax(-1))
    nll = functional.nll_loss(torch.stack(members).mean(0).log().movedim(-1, 1), targets)
    assert result.scores["nll"] == pytest.approx(nll.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("output", "targets", "name"),
    [
        (torch.zeros(8, 3), labels(3, 8), "multiclass"),
        (torch.zeros(8, 3, 5), labels(3, 8, 5), "multiclass"),
        (torch.zeros(8, 5, 3), labels(3, 8, 5), "multiclass"),
        (torch.zeros(8, 3), torch.full((8, 3), 1 / 3), "multiclass"),
        (torch.zeros(8, 1), labels(2, 8), "binary"),
        (torch.zeros(8), labels(2, 8).bool(), "binary"),
        (torch.zeros(8, 1, 4, 4), labels(2, 8, 4, 4), "binary"),
        (torch.zeros(8, 6), labels(2, 8, 6), "multilabel"),
        (torch.zeros(8, 6), torch.cat([torch.ones(8, 2), torch.zeros(8, 4)], 1), "multilabel"),
        (torch.zeros(8, 1), torch.linspace(0, 1, 8), "regression"),
        (torch.zeros(8, 2), torch.randn(8, 2), "regression"),
        (GaussianOutput(torch.zeros(8), torch.ones(8)), labels(2, 8), "regression"),
    ],
)
def test_the_task_that_a_batch_looks_like(output, targets, name):
    assert decide_task(output, targets).name == name


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([[torch.inf, 0.0, 1.0]], [[1.0, 0.0, 0.0]]),
        ([[torch.inf, torch.inf, 1.0]], [[0.5, 0.5, 0.0]]),
        ([[-torch.inf, 0.0, 0.0]], [[0.0, 0.5, 0.5]]),
        ([[3e38, -3e38, 0.0]], [[1.0, 0.0, 0.0]]),
    ],
)
def test_infinite_logits_are_limits(logits, expected):
    assert torch.equal(probabilities_of(torch.tensor(logits)), torch.tensor(expected))
    binary = TaskReader("binary").read(torch.tensor([torch.inf, -torch.inf]), torch.tensor([1, 1]))[0]
    assert torch.equal(binary, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_nan_logits_stay_nan():
    assert probabilities_of(torch.tensor([[torch.inf, torch.nan]])).isnan().all()


@pytest.mark.parametrize(
    ("net", "targets"),
    [(Net(3), labels(3, 24)), (Net(1), labels(2, 24)), (Net(1), torch.linspace(-1, 1, 24))],
    ids=["multiclass", "binary", "regression"],
)
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.filterwarnings("ignore:Predictions are means")
def test_a_sample_that_predicts_nan_is_named(net, targets, scored):
    """One bad sample of three: no score is made of it, and the message says which it is."""
    bank = bank_of(net)
    poisoned = []

    def logits(module, batch):
        poisoned.append(1)
        out = module(batch[0])
        return torch.where(torch.tensor(len(poisoned) in (3, 4)), torch.full_like(out, torch.nan), out)

    with pytest.raises(NonFinitePredictionError, match=r"Sample 1 \(step 1, chain 0\) predicts NaN.* for 24 points"):
        average(net, bank, inputs(), targets, logits=logits, **({} if scored else {"metrics": None}))


@pytest.mark.filterwarnings("ignore:Predictions are means", "ignore:The ``compute`` method")
@pytest.mark.parametrize("task", ["multiclass", "binary", Regression(ignore_index=-100)])
def test_everything_ignored(task):
    """Scores of nothing are NaN, and nothing raises."""
    net = Net(3 if task == "multiclass" else 1)
    targets = torch.full((24,), -100) if isinstance(task, str) else torch.full((24,), -100.0)
    result = average(net, bank_of(net), inputs(), targets, task=task)
    scores = result.scores | result.further_scores()
    assert all(math.isnan(value) for value in scores.values()), scores
    assert len(result.predictive) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TaskReader("detection"), ValueError, "`task` must be 'auto'.*got 'detection'"),
        (lambda: TaskReader(3), ValueError, "`task` must be a name or a task"),
        (lambda: TaskReader(Binary(), 255), ValueError, r"Give `ignore_index` to Binary\(...\)"),
        (lambda: Regression("variance"), ValueError, "`outputs` must be.*got 'variance'"),
        (lambda: Regression(noise_variance=0.0), ValueError, "`noise_variance` must be above 0"),
        (
            lambda: decide_task(torch.zeros(4, 1), torch.tensor([0, 1, 2, 1])),
            ValueError,
            "one of them is 2.*regression",
        ),
        (lambda: Multiclass().read(torch.zeros(2, 3), torch.tensor([0, 255])), ValueError, "pass ignore_index=255"),
        (
            lambda: Multiclass().read(torch.zeros(2, 3), torch.zeros(2, 2).long()),
            ValueError,
            r"\(batch, classes, ...\)",
        ),
        (lambda: Binary().read(torch.zeros(2), torch.tensor([0.0, 7.0])), ValueError, "0 or 1.*got 7.0"),
        (lambda: Regression().read(torch.zeros(3, 2), torch.zeros(3)), ValueError, "shape of the means"),
        (lambda: Regression().read(torch.zeros(1), torch.tensor([torch.nan])), ValueError, "a target is not finite"),
        (
            lambda: Regression().read(GaussianOutput(torch.zeros(1), -torch.ones(1)), torch.zeros(1)),
            ValueError,
            "variances must be above 0, got -1.*mean_log_variance",
        ),
        (lambda: read_output((torch.zeros(1), torch.zeros(1))), TypeError, "pair of tensors"),
        (lambda: read_output(torch.zeros(2, 3), "mean_variance"), ValueError, r"dim 1.*got shape \(2, 3\)"),
        (lambda: read_output(torch.distributions.Poisson(torch.ones(1))), TypeError, "got Poisson"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_verdict_on_samples_that_are_too_alike():
    """Nearly equal samples are called alike, different ones are not; the sentence says what to change."""
    for scale, alike in ((0.0, True), (1.0, False)):
        net, x, targets = Net(3), inputs(), labels(3, 24)
        bank, generator = SampleBank(), torch.Generator().manual_seed(1)
        for step in range(4):
            with torch.no_grad():
                net.layer.weight.copy_(1.0 + scale * torch.randn(3, 4, generator=generator) + 1e-3 * step)
            bank.add(net, step=step)
        result = average(net, bank, x, targets)
        scores = result.scores | result.further_scores() | {"size": 4.0, "ambiguity": result.ambiguity}
        verdict = diversity_verdict(scores, sum(r.sample["nll"] for r in result.history) / 4)
        assert (verdict is not None) == alike
        assert not alike or "4 samples are too alike" in verdict
        assert not alike or "SampleCollector(every=...)" in verdict
    apart = {"size": 4.0, "ambiguity": 1e-4, "disagreement": 0.3}
    assert diversity_verdict(apart, 1.0) is None
    numbers = {"size": 4.0, "ambiguity": 0.1, "epistemic": 0.001, "aleatoric": 1.0}
    assert "variance of 0.001" in diversity_verdict(numbers, -3.0)
    assert diversity_verdict({**numbers, "epistemic": 0.1}, -3.0) is None
    assert diversity_verdict({**numbers, "size": 1.0}, -3.0) is None
