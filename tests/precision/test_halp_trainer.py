"""SVRG and HALP as ``LowPrecisionSGLD(sampler=...)``: one line in the Trainer, also resumed and on two ranks."""

from __future__ import annotations

import functools
import io
import os
import socket

import lightning.pytorch as pl
import pytest
import rich
import torch
import torchmetrics
from helpers.models import Classifier, RecordingLogger, SyntheticData, make_trainer, small_convnet, small_mlp
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_lpsgld.precision import LowPrecisionSGLD
from lightning_lpsgld.precision.variance_reduction import full_data_loader
from lightning_lpsgld.samplers import HALP, SVRG

#: Nothing but the sampler rounds; optimization, not sampling.
PLAIN = {"weights": None, "gradients": None, "activations": None, "errors": None, "temperature": 0.0, "seed": 3}


def halp(**options):
    return functools.partial(HALP, **{"mu": 2.0, **options})


def fit(module, data, sampler, *, plugin=None, **options):
    trainer = make_trainer(plugins=[LowPrecisionSGLD(sampler=sampler, **{**PLAIN, **(plugin or {})})], **options)
    trainer.fit(module, data)
    return trainer


# ------------------------------------------------------------------------------------------------------- it trains


def test_eight_bit_offsets_reach_the_loss_of_full_precision_svrg_on_digits():
    inputs, targets = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(targets))

    def final_loss(sampler):
        torch.manual_seed(0)
        module = Classifier(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), lr=0.3, weight_decay=1e-3)
        torch.manual_seed(1)  # the same order of batches
        fit(module, DataLoader(data, 100, shuffle=True), sampler, max_epochs=8)
        with torch.no_grad():
            return float(nn.functional.cross_entropy(module(data.tensors[0]), data.tensors[1]))

    reference = final_loss(SVRG)
    assert reference < 0.5  # from log(10) = 2.3: there was something to learn
    assert final_loss(halp()) < 1.05 * reference
    assert final_loss(halp(mu=None, offset_format="bfp8")) < 1.05 * reference


def test_the_whole_table_of_roundings_runs_and_the_card_names_the_offsets():
    module = small_convnet()
    trainer = fit(
        module,
        SyntheticData(shape=(1, 6, 6)),
        halp(),
        plugin={"weights": "bfp8", "gradients": "bfp8", "activations": "bfp8", "errors": "bfp8", "temperature": 1e-3},
        max_epochs=2,
    )
    card = trainer.precision_plugin.card
    assert card.formats == {
        "offsets": "fixed8.0s", "gradients": "bfp8", "activations": "bfp8", "errors": "bfp8",
    }  # fmt: skip
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("kind", ["rich", "tqdm"])
def test_the_full_gradient_pass_is_counted_beside_the_progress_bar(kind, capsys, monkeypatch):
    monkeypatch.setattr(rich, "_console", None)  # the bar configures the console of the process for good
    shown = io.StringIO()
    console = {"file": shown, "force_terminal": True, "width": 200}
    bar = RichProgressBar(refresh_rate=1, console_kwargs=console) if kind == "rich" else TQDMProgressBar(refresh_rate=1)
    module, data = small_mlp(), SyntheticData(n_train=70, batch_size=16)
    trainer = fit(module, data, halp(), max_epochs=2, callbacks=[bar], enable_progress_bar=True)
    assert "Full gradient" in (shown.getvalue() if kind == "rich" else "".join(capsys.readouterr()))
    if kind == "rich":  # one task for all epochs, hidden when a pass is over
        tasks = [t for t in bar.progress.tasks if t.description == "Full gradient"]
        assert [(t.total, t.completed, t.visible) for t in tasks] == [(5, 5, False)]
    assert trainer.global_step == 10


def test_the_full_gradient_is_exact_and_weights_the_short_batch():
    """70 examples in batches of 16: the last has 6. Taken at the first step, over all data, at the initial weights."""
    module, data = small_mlp(), SyntheticData(n_train=70, batch_size=16)
    twin = small_mlp()
    loss = nn.functional.cross_entropy(twin(data.train.tensors[0]), data.train.tensors[1])
    expected = torch.autograd.grad(loss, list(twin.parameters()))
    trainer = fit(module, data, SVRG, max_steps=2)
    for param, grad in zip(module.parameters(), expected):
        torch.testing.assert_close(trainer.optimizers[0].state[param]["full_gradient"], grad)


def test_a_centre_an_epoch_or_a_period():
    for period, expected in ((None, 2), (3, 4), (100, 1)):
        calls = []

        class Counting(SVRG):
            def recentre(self, full_closure, calls=calls):
                calls.append(self.steps)
                return super().recentre(full_closure)

        fit(small_mlp(), SyntheticData(n_train=48), functools.partial(Counting, period=period), max_epochs=2)
        assert len(calls) == expected, (period, calls)  # 12 steps


def _signatures():
    """Every way in which Lightning lets a training step be written: the step of `Classifier` behind it."""

    def named(self, batch, batch_idx):
        return Classifier.training_step(self, batch, batch_idx)

    def other_name(self, batch, i):
        return Classifier.training_step(self, batch, i)

    def underscore(self, b, _):
        return Classifier.training_step(self, b, _)

    def batch_alone(self, batch):
        return Classifier.training_step(self, batch, 0)

    def default(self, batch, batch_idx=0):
        return Classifier.training_step(self, batch, batch_idx)

    def keyword_default(self, batch, *, scale=1.0):
        return scale * Classifier.training_step(self, batch, 0)

    def variadic(self, *args):
        assert len(args) == 2
        return Classifier.training_step(self, *args)

    def positional_only(self, batch, batch_idx, /):
        return Classifier.training_step(self, batch, batch_idx)

    def dictionary(self, batch, idx):
        return {"loss": Classifier.training_step(self, batch, idx)}

    return {step.__name__: step for step in (
        named, other_name, underscore, batch_alone, default, keyword_default, variadic, positional_only, dictionary,
    )}  # fmt: skip


@pytest.mark.parametrize("signature", _signatures())
@pytest.mark.parametrize("sampler", [halp(), SVRG], ids=["halp", "svrg"])
def test_every_signature_that_lightning_accepts_takes_the_same_steps(signature, sampler):
    def weights(step):
        module = small_mlp()
        torch.manual_seed(0)
        fit(type("Module", (Classifier,), {"training_step": step})(module.net), SyntheticData(n_train=24), sampler)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights(_signatures()[signature]), weights(_signatures()["named"]))


def test_the_number_of_the_batch_reaches_the_step_in_the_full_pass_too():
    numbers = []

    class Numbered(Classifier):
        def training_step(self, batch, k):
            numbers.append(k)
            return super().training_step(batch, k)

    fit(Numbered(small_mlp().net), SyntheticData(n_train=24), SVRG)
    assert numbers == [0, 1, 2, 0, 0, 1, 1, 2, 2]  # the full pass, then each batch at the centre and at the point


def test_a_step_that_fetches_its_own_batches_is_refused_with_the_way_out():
    class Fetching(Classifier):
        def training_step(self, dataloader_iter):
            (inputs, targets), _, _ = next(dataloader_iter)
            return nn.functional.cross_entropy(self(inputs), targets)

    with pytest.raises(RuntimeError, match=r"SVRG evaluates .* twice .* Fetching.training_step\(dataloader_iter\)"):
        fit(Fetching(small_mlp().net), SyntheticData(), SVRG)
    fit(Fetching(small_mlp().net), SyntheticData(), None, max_epochs=1)  # one evaluation a batch is no trouble


# ----------------------------------------------------------------------------------------------------- no trace left


class Watcher(Callback):
    def __init__(self):
        self.calls, self.norms = {}, []

    def _count(self, name):
        self.calls[name] = self.calls.get(name, 0) + 1

    def on_before_zero_grad(self, *args):
        self._count("zero_grad")

    def on_after_backward(self, *args):
        self._count("backward")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self._count("step")


class WithMetric(Classifier):
    def __init__(self, net, **options):
        super().__init__(net, **options)
        self.seen = torchmetrics.SumMetric()

    def training_step(self, batch, batch_idx):
        self.seen.update(len(batch[1]))
        loss = super().training_step(batch, batch_idx)
        self.log("twice", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def on_train_epoch_end(self):
        self.total = float(self.seen.compute())


def test_logs_metrics_callbacks_and_batchnorm_see_each_step_once():
    net = small_convnet().net
    module, data, watcher, logger = WithMetric(net), SyntheticData(shape=(1, 6, 6)), Watcher(), RecordingLogger()
    fit(module, data, halp(), callbacks=[watcher], logger=logger, log_every_n_steps=1)
    assert watcher.calls == {"zero_grad": 8, "backward": 8, "step": 8}
    assert module.total == 64
    assert [row["twice"] for _, row in logger.rows if "twice" in row] == [8.0]
    assert len([1 for _, row in logger.rows if "train_loss" in row]) == 8
    assert int(net[1].num_batches_tracked) == 8
    assert "log" not in module.__dict__


def test_the_corrected_gradient_is_what_is_clipped():
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(float(torch.stack([p.grad.norm() for p in module.parameters()]).norm()))

    fit(small_mlp(), SyntheticData(), halp(), callbacks=[Look()], gradient_clip_val=1e-3, max_epochs=2)
    assert len(seen) == 16
    assert all(0.999e-3 < norm <= 1e-3 * (1 + 1e-5) for norm in seen)


def test_an_epoch_has_the_same_order_with_and_without_the_full_pass():
    def order(sampler):
        rows = []

        class Look(Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                rows.append(batch[1].clone())

        torch.manual_seed(4)
        fit(small_mlp(), SyntheticData(), sampler, callbacks=[Look()], max_epochs=3)
        return torch.cat(rows)

    assert torch.equal(order(None), order(SVRG))


# ------------------------------------------------------------------------------------------------------------ resume


class ResumableLoader(DataLoader):
    """Order and position are in a ``state_dict``, as ``torchdata.StatefulDataLoader`` has it."""

    def __init__(self):
        super().__init__(SyntheticData(n_train=80).train, 16, shuffle=True)
        self.epoch = self.position = 0

    def __iter__(self):
        if self.position == 5:
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(80, generator=torch.Generator().manual_seed(self.epoch)).view(5, 16)
        while self.position < 5:
            rows, self.position = order[self.position], self.position + 1
            yield [t[rows] for t in self.dataset.tensors]

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


@pytest.mark.parametrize("sampler", [halp(), functools.partial(SVRG, weight_format="bfp8")], ids=["halp", "lp-svrg"])
@pytest.mark.parametrize("stop", [5, 7], ids=["epoch-end", "mid-epoch"])
def test_resume_equals_uninterrupted_bitwise(tmp_path, sampler, stop):
    """Also with dropout in the full pass, whose draws are named by the step; with noise; with rounded activations."""
    plugin = {"temperature": 1e-3, "activations": "bfp8"}

    def run(steps, ckpt=None):
        module = small_mlp()
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
        trainer = make_trainer(
            plugins=[LowPrecisionSGLD(sampler=sampler, **{**PLAIN, **plugin})], callbacks=[saver],
            enable_checkpointing=True, max_epochs=-1, max_steps=steps,
        )  # fmt: skip
        trainer.fit(module, ResumableLoader(), ckpt_path=ckpt)
        return module, trainer

    whole, full = run(12)
    run(stop)
    torch.manual_seed(99)  # a new process has another generator
    resumed, continued = run(12, ckpt=tmp_path / f"step={stop}.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name
    for a, b in zip(full.optimizers[0].state.values(), continued.optimizers[0].state.values()):
        for name in a:
            assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name], name


# ----------------------------------------------------------------------------------------------------------- 2 ranks


class InOrder(Classifier):
    """Trains in float64, so that summation order stays far below what is compared."""

    def __init__(self):
        super().__init__(small_mlp().net.double())

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].double(), batch[1]), batch_idx)


class InOrderData(pl.LightningDataModule):
    """63 examples, not shuffled (Lightning shuffles the training data of ranks by itself); rank r gets r, r + 2, ..."""

    def __init__(self, batch_size):
        super().__init__()
        self.data, self.batch_size = SyntheticData(n_train=63).train, batch_size

    def train_dataloader(self):
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.data, num_replicas=ranks, rank=rank, shuffle=False)
        return DataLoader(self.data, self.batch_size, sampler=sampler if ranks > 1 else None)


def _train(sampler, batch_size, **options):
    module = InOrder()
    trainer = make_trainer(
        plugins=[LowPrecisionSGLD(sampler=sampler, **PLAIN)], max_epochs=2, limit_train_batches=3,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module, InOrderData(batch_size))
    return module, trainer


def _rank(rank, port, path):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    strategy = DDPStrategy(process_group_backend="gloo")
    module, trainer = _train(functools.partial(HALP, mu=0.5), 8, devices=2, strategy=strategy)
    torch.save(
        {"weights": module.state_dict(), "state": trainer.optimizers[0].state_dict()["state"]}, f"{path}/{rank}.pt"
    )


def test_two_ranks_equal_one_process_on_the_same_global_batches(tmp_path):
    """Steps of 2 x 8 are the single process's 16. The odd example makes the sampler repeat one, which the full
    gradient must not count twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    module, trainer = _train(functools.partial(HALP, mu=0.5), 16)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = trainer.optimizers[0].state_dict()["state"]
    for name, value in module.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert (first["weights"][name] - value).abs().max() < 1e-12 * value.abs().max()
    for number, state in alone.items():
        assert torch.equal(first["state"][number]["offset"], state["offset"])
        assert first["state"][number]["gap"] == pytest.approx(state["gap"], rel=1e-12)


# ---------------------------------------------------------------------------------------------- loaders and refusals


@pytest.mark.parametrize(("count", "ranks"), [(63, 2), (10, 3), (64, 4)])
def test_shares_of_the_ranks_cover_the_data_once(count, ranks):
    data = TensorDataset(torch.arange(count))
    seen = []
    for rank in range(ranks):
        sampler = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=True)
        seen += [
            int(i) for (batch,) in full_data_loader(DataLoader(data, 4, sampler=sampler, drop_last=True)) for i in batch
        ]
    assert sorted(seen) == list(range(count))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(4, 2))


def test_refusals_name_the_way_out():
    with pytest.raises(ValueError, match="map-style"):
        full_data_loader(DataLoader(Stream()))
    with pytest.raises(RuntimeError, match="accumulate_grad_batches=1"):
        fit(small_mlp(), SyntheticData(), SVRG, accumulate_grad_batches=2)
    manual = small_mlp()
    manual.automatic_optimization = False
    with pytest.raises(RuntimeError, match="automatic optimization"):
        fit(manual, SyntheticData(), halp())
    with pytest.raises(ValueError, match="accumulator"):
        fit(small_mlp(), SyntheticData(), halp(), plugin={"accumulator": "full"})


@pytest.mark.parametrize("sampler", [SVRG, functools.partial(HALP, mu=1.0)], ids=["svrg", "halp"])
def test_casts_draw_the_same_at_the_centre_and_at_the_point(sampler):
    """Right after a centre both are one point: equal draws of activations and errors cancel to the bit."""

    class Look(Callback):
        equal = 0

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if optimizer.inner_steps == 0:
                for param in pl_module.parameters():
                    assert torch.equal(param.grad, optimizer.state[param]["full_gradient"])
                    self.equal += 1

    look = Look()
    casts = {"activations": "bfp4", "errors": "bfp4"}
    fit(small_mlp(), SyntheticData(shuffle=False), sampler, plugin=casts, max_epochs=2, callbacks=[look])
    assert look.equal == 4 * 2, "two epochs, four parameters"
