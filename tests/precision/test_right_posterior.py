"""Settings that used to sample another posterior without a word: the law is right, or the run is refused or says so."""

from __future__ import annotations

import functools
import math

import lightning.pytorch as pl
import pytest
import torch
from helpers.models import Classifier, SyntheticData, make_trainer, small_mlp
from helpers.stats import assert_normal, draws_for_distribution
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.precision.num_data import counted_examples
from lightning_lpsgld.samplers import SGLD, SVRG

PLAIN = {"weights": None, "gradients": None, "activations": None, "errors": None, "temperature": 1.0, "seed": 3}
DETECT = 0.03  # a variance of 1.17 or 0.85 times the right one
CHAINS = draws_for_distribution(DETECT)
N, LR = 200, 0.2


class Gaussian(pl.LightningModule):
    """Many independent means of N = 200 observations of variance 1, all of them zero: the posterior is N(0, 1/N).

    Every batch has the same gradient, so that the chain is an autoregression of variance 1/(N(1 - lr/2)), exactly.
    """

    def __init__(self, reduce="mean", scale=1.0):
        super().__init__()
        self.theta, self.reduce, self.scale = nn.Parameter(torch.ones(CHAINS)), reduce, scale

    def training_step(self, batch, batch_idx):
        losses = (self.theta - batch[0]).square().sum(-1) / 2  # one per example
        return self.scale * getattr(losses, self.reduce)()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def observations(batch_size=50):
    return DataLoader(TensorDataset(torch.zeros(N, 1)), batch_size)


def assert_posterior(module, num_data=N):
    assert_normal(module.theta.detach() * math.sqrt(num_data * (1 - LR / 2)), detect=DETECT)


def sample(module, loader, *, steps=80, plugin=None, **options):
    plugin = LowPrecisionSGLD(**{**PLAIN, **(plugin or {})})
    make_trainer(plugins=[plugin], max_epochs=-1, max_steps=steps, **options).fit(module, loader)
    return plugin


# ------------------------------------------------------------------------------------------------ the size of a step


@pytest.mark.parametrize(("accumulate", "batch_size"), [(1, 50), (3, 50), (2, 40), (7, 50)])
def test_the_group_that_the_end_of_an_epoch_cuts_short_has_a_whole_gradient(accumulate, batch_size):
    """3 of 4 batches and then 1; 2, 2 and 1 of 5; all 4 where 7 were asked for."""
    module = Gaussian()
    sample(module, observations(batch_size), accumulate_grad_batches=accumulate)
    assert_posterior(module)


def test_also_where_a_scheduler_changes_the_accumulation():
    module, scheduler = Gaussian(), GradientAccumulationScheduler({0: 1, 5: 3})
    sample(module, observations(), callbacks=[scheduler])
    assert_posterior(module)


@pytest.mark.parametrize("batch_size", [8, 200])
def test_a_sum_over_the_batch_is_refused_and_can_be_scaled(batch_size):
    with pytest.raises(ValueError, match=r"sum over the batch.*reduction='mean'.*loss_scale=<batch size>"):
        sample(Gaussian("sum"), observations(batch_size), steps=1)
    module = Gaussian("sum")
    plugin = sample(module, observations(batch_size), plugin={"loss_scale": float(batch_size)})
    assert_posterior(module)
    assert f"exp(-N loss / {batch_size})" in plugin.card.likelihood


def test_a_loss_that_is_a_multiple_is_scaled_with_accumulation_too():
    module = Gaussian(scale=5.0)
    sample(module, observations(), plugin={"loss_scale": 5.0}, accumulate_grad_batches=3)
    assert_posterior(module)


def test_a_sum_is_no_trouble_without_noise_and_the_scale_is_refused_where_it_does_not_act():
    sample(Gaussian("sum"), observations(), steps=1, plugin={"temperature": 0.0})
    with pytest.raises(ValueError, match="`loss_scale` is not for SVRG"):
        sample(Gaussian(), observations(), plugin={"loss_scale": 2.0, "sampler": SVRG})
    for wrong in (0.0, -1.0, math.inf, "sum"):
        with pytest.raises((TypeError, ValueError), match="LowPrecisionSGLD: `loss_scale` must be"):
            LowPrecisionSGLD(loss_scale=wrong)


def test_looking_at_the_loss_leaves_no_trace():
    """Coupled: dropout, BatchNorm, logged values, order of batches, and draws of casts are those of a run that does not
    look (which `loss_scale` says)."""

    def run(**options):
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        torch.manual_seed(2)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape) / 2)
        module = Classifier(net)
        torch.manual_seed(5)
        trainer = make_trainer(plugins=[LowPrecisionSGLD(seed=1, **options)])
        trainer.fit(module, SyntheticData())
        return module.state_dict(), trainer.callback_metrics["train_loss"]

    looked, loss = run()
    blind, other = run(loss_scale=1.0)
    assert all(torch.equal(looked[name], blind[name]) for name in looked)
    assert torch.equal(loss, other)


# ----------------------------------------------------------------------------------------------------- what is seen


class Custom(Sampler):
    def __init__(self, indices):
        self.indices = indices

    def __iter__(self):
        return iter(self.indices)


class Sized(Custom):
    def __len__(self):
        return len(self.indices)


class Pairs(Sampler):
    """A batch sampler of its own kind."""

    def __iter__(self):
        return iter([[0, 1], [2, 3]])

    def __len__(self):
        return 2


DATA = TensorDataset(torch.zeros(N, 1))
HALF = list(range(0, N, 2))


@pytest.mark.parametrize(
    ("loader", "count", "note"),
    [
        ({"batch_size": 8, "shuffle": True}, N, ""),
        ({"batch_size": 8, "sampler": SubsetRandomSampler(HALF)}, 100, "the subset"),
        ({"batch_size": 8, "sampler": Sized(HALF)}, 100, "the examples that Sized visits in an epoch"),
        ({"batch_size": 8, "sampler": Custom(HALF)}, N, "Custom does not say how many"),
        ({"batch_size": 8, "sampler": RandomSampler(DATA, num_samples=50)}, N, ""),
        ({"batch_size": 8, "sampler": Sized(HALF * 10)}, N, ""),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(HALF), 8, drop_last=False)}, 100, "the subset"),
        ({"batch_sampler": BatchSampler(Sized(HALF), 8, drop_last=False)}, 100, "Sized visits"),
        ({"batch_sampler": BatchSampler(RandomSampler(DATA), 8, drop_last=True)}, N, ""),
        ({"batch_sampler": [[0, 1], [1, 2]]}, 3, "3 different indices"),
        ({"batch_sampler": Pairs()}, N, "Pairs does not say how many"),
        ({"batch_size": 8, "sampler": WeightedRandomSampler([1.0] * 150 + [0.0] * 50, 10)}, 150, "weight > 0"),
    ],
)
def test_n_counts_the_examples_that_are_seen(loader, count, note):
    found = counted_examples(DataLoader(DATA, **loader))
    assert found.count == count
    assert note in found.note
    assert bool(note) == bool(found.note)


@pytest.mark.parametrize(
    ("options", "shuffle", "count"),
    [
        ({"overfit_batches": 2}, False, 20),
        ({"overfit_batches": 2}, True, 20),  # Lightning turns shuffling off
        ({"limit_train_batches": 5}, False, 50),
        ({"limit_train_batches": 0.5}, False, 100),
        ({"limit_train_batches": 5}, True, N),  # another part in every epoch
        ({}, False, N),
    ],
)
def test_n_counts_what_cut_epochs_see(options, shuffle, count):
    loader = DataLoader(DATA, 10, shuffle=shuffle)
    module = Gaussian()
    plugin = sample(module, loader, steps=1, **options)
    assert plugin.card.num_data == plugin.samplers[0].num_data == count
    assert (f"the first {count} of {N} examples" in str(plugin.card)) == (count < N)


def test_a_dropped_last_batch_is_not_seen_without_shuffling():
    plugin = sample(Gaussian(), DataLoader(DATA, 30, drop_last=True), steps=1)
    assert plugin.card.num_data == 180
    assert sample(Gaussian(), DataLoader(DATA, 30, drop_last=True, shuffle=True), steps=1).card.num_data == N


def test_the_posterior_is_that_of_the_examples_seen():
    module = Gaussian()
    sample(module, DataLoader(DATA, 50, sampler=SequentialSampler(DATA)), limit_train_batches=1)
    assert_posterior(module, num_data=50)


# ---------------------------------------------------------------------------------------------- what the card says


class Loss(Classifier):
    def __init__(self, loss):
        super().__init__(small_mlp().net)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), "reweighted likelihood: class weights of cross_e"),
        (lambda z, y: nn.functional.cross_entropy(z, y, torch.tensor([1.0, 2.0, 3.0])), "reweighted likelihood: class"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "reweighted likelihood: label smoothing 0.1"),
        (
            lambda z, y: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))(z[:, 0], (y > 0).float()),
            "class weights of binary_cross_entropy_with_logits",
        ),
        (lambda z, y: nn.functional.mse_loss(z[:, 0], y.float()), "Gaussian of variance 1/2 per element"),
        (lambda z, y: nn.functional.nll_loss(z.log_softmax(-1), y), "categorical (nll_loss)"),
        (lambda z, y: z.square().mean(), "the module's own"),
        (lambda z, y: z.square().mean() + z.square().sum() / len(z) ** 2, "so it is no mean over examples"),
    ],
)
def test_the_card_says_which_likelihood_is_assumed(loss, words):
    plugin = LowPrecisionSGLD(seed=1)
    make_trainer(plugins=[plugin], max_steps=1).fit(Loss(loss), SyntheticData())
    assert words in plugin.card.likelihood
    assert ("reweighted" in plugin.card.likelihood) == ("class weights" in words or "reweighted" in words)
    assert plugin.card.likelihood in str(plugin.card)


def test_a_weighted_sampler_is_a_reweighted_likelihood():
    loader = DataLoader(DATA, 10, sampler=WeightedRandomSampler(torch.rand(N) + 0.1, N))
    assert "reweighted likelihood: a weighted sampler" in sample(Gaussian(), loader, steps=1).card.likelihood


def test_a_sum_of_torchs_losses_is_refused():
    with pytest.raises(ValueError, match="sum over the batch"):
        make_trainer(plugins=[LowPrecisionSGLD()]).fit(Loss(nn.CrossEntropyLoss(reduction="sum")), SyntheticData())


def test_a_step_that_cannot_be_tried_is_warned_of_and_trains():
    class InLoop(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.0 * self.started

        def on_train_start(self):
            self.started = 1.0

    trainer = make_trainer(plugins=[LowPrecisionSGLD(seed=1)], max_steps=2)
    with pytest.warns(UserWarning, match=r"could not evaluate training_step before training .*loss_scale=1.0"):
        trainer.fit(InLoop(small_mlp().net), SyntheticData())
    assert trainer.global_step == 2
    assert "not checked" in trainer.precision_plugin.card.likelihood


# ------------------------------------------------------------------------------------------- the sampler that runs


def test_card_and_refusals_ask_the_sampler_that_a_partial_makes():
    sampler = functools.partial(SGLD, weight_format="fixed8.6", gradient_format=None, accumulator="full")
    plugin = LowPrecisionSGLD(activations=None, errors=None, sampler=sampler)
    make_trainer(plugins=[plugin], max_steps=1).fit(small_mlp(), SyntheticData())
    assert plugin.card.formats == {"weights": "fixed8.6"}
    averaging = StochasticWeightAveraging(swa_lrs=0.1)
    with pytest.raises(RuntimeError, match="averages `parameters\\(\\)`"):
        make_trainer(plugins=[LowPrecisionSGLD(sampler=sampler)], callbacks=[averaging]).fit(
            small_mlp(), SyntheticData()
        )
    wide = functools.partial(SGLD, weight_format="fixed20.6")
    module = small_mlp().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"LowPrecisionSGLD\(weights='fixed20.6'\) cannot hold net.0.weight"):
        make_trainer(plugins=[LowPrecisionSGLD(gradients=None, sampler=wide)]).fit(module, SyntheticData())


def test_card_and_refusals_ask_the_sampler_that_the_module_returns():
    class Own(Classifier):
        def configure_optimizers(self):
            return SGLD(self.parameters(), 0.1, num_data=77, weight_format="fixed8.5", accumulator="full")

    plugin = LowPrecisionSGLD(accumulator="low")
    make_trainer(plugins=[plugin], max_steps=1).fit(Own(small_mlp().net), SyntheticData())
    assert plugin.card.formats["weights"] == "fixed8.5"
    assert "gradients" not in plugin.card.formats
    assert (plugin.card.num_data, plugin.card.data_note) == (77, "of the sampler")
    with pytest.raises(RuntimeError, match="averages `parameters\\(\\)`"):
        make_trainer(plugins=[LowPrecisionSGLD()], callbacks=[StochasticWeightAveraging(swa_lrs=0.1)]).fit(
            Own(small_mlp().net), SyntheticData()
        )


@pytest.mark.parametrize("accumulate", [64, 100])
def test_the_patience_counts_steps_not_batches(accumulate):
    data = SyntheticData(n_train=2 * accumulate, batch_size=1)
    trainer = make_trainer(plugins=[LowPrecisionSGLD(seed=1)], accumulate_grad_batches=accumulate)
    trainer.fit(small_mlp(), data)
    assert trainer.global_step == 2


def test_autocast_is_asked_for_on_the_modules_device_also_in_a_test_without_a_fit(monkeypatch):
    asked, autocast = [], torch.autocast

    def recorded(device_type, **options):
        asked.append(device_type)
        return autocast("cpu", enabled=False)

    monkeypatch.setattr(torch, "autocast", recorded)
    plugin = LowPrecisionSGLD(compute="bf16-mixed", activations=None, errors=None)
    module = plugin.convert_module(small_mlp().to("meta"))
    with plugin.forward_context():
        assert next(module.parameters()).device.type == "meta"
    assert asked == ["meta"]
    make_trainer(plugins=[plugin]).test(small_mlp(), SyntheticData(), verbose=False)
    assert set(asked[1:]) == {"cpu"}
