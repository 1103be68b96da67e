"""An unmodified LightningModule keeps working: one test for each thing that users combine with a plugin."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.samplers import SGLD


def loader(count=48, shape=(6,), classes=3, batch_size=16, sequence_of=None):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, *shape, generator=generator)
    if sequence_of is not None:
        x = torch.randint(0, sequence_of, (count, *shape), generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, classes, (count,), generator=generator)), batch_size)


class Module(L.LightningModule):
    """A user's module, as ordinary as they come."""

    def __init__(self, net=None, optimizer=None, scheduler=None):
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.make_optimizer = optimizer or (lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        self.make_scheduler = scheduler

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).softmax(-1)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self)
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}


def trainer(tmp_path, plugin=None, **options):
    defaults = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    return L.Trainer(plugins=[plugin or LowPrecisionSGLD(seed=0)], **{**defaults, **options})


def fit(tmp_path, module, plugin=None, data=None, **options):
    run = trainer(tmp_path, plugin, **options)
    keys = list(module.state_dict())
    kind, before = type(module), {k: v.clone() for k, v in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        run.fit(module, loader() if data is None else data, loader())
    assert list(module.state_dict()) == keys
    assert type(module) is kind
    moved = [k for k, v in module.state_dict().items() if v.is_floating_point() and not torch.equal(v, before[k])]
    assert moved, "nothing was trained"
    return run


def on_grid(parameters, fmt="bfp8"):
    return all(torch.equal(quantize(p.detach(), fmt, rounding="nearest"), p.detach()) for p in parameters)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
        lambda m: torch.optim.Adam(m.parameters(), lr=0.05),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.01),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_optimizers(tmp_path, optimizer):
    module = Module(optimizer=optimizer)
    run = fit(tmp_path, module)
    assert isinstance(run.optimizers[0], SGLD)
    assert on_grid(module.parameters())


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        lambda o: {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(o, 6), "interval": "step"},
        lambda o: {"scheduler": torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10), "interval": "step"},
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
        lambda o: {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0), "monitor": "val_loss"},
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 1), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
            milestones=[1],
        ),
    ],
    ids=["step", "cosine", "onecycle", "lambda", "plateau", "sequential"],
)
def test_lr_schedulers_drive_the_sampler(tmp_path, scheduler):
    """The sampler's learning rate is the scheduler's, and no step-order warning is given (an error in `fit`)."""
    module = Module(scheduler=scheduler)
    run = fit(tmp_path, module, callbacks=[])
    scheduled = run.lr_scheduler_configs[0].scheduler
    assert run.optimizers[0].param_groups is scheduled.optimizer.param_groups


def test_learning_rate_monitor_early_stopping_checkpoints_and_progress_bars(tmp_path):
    module = Module(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
    checkpoints = ModelCheckpoint(dirpath=tmp_path / "ckpt", monitor="val_loss", save_last=True)
    run = fit(
        tmp_path,
        module,
        max_epochs=3,
        callbacks=[EarlyStopping("val_loss", patience=10), checkpoints, LearningRateMonitor(), TQDMProgressBar()],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    assert run.callback_metrics["val_loss"].isfinite()
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "lr-SGD" in rows
    assert "0.05" in rows
    assert checkpoints.best_model_path


def test_rich_progress_bar(tmp_path):
    pytest.importorskip("rich")
    fit(tmp_path, Module(), max_epochs=1, callbacks=[RichProgressBar()], enable_progress_bar=True)


def test_validate_test_and_predict_from_a_checkpoint(tmp_path):
    module = Module()
    run = fit(tmp_path, module, enable_checkpointing=True)
    path = tmp_path / "end.ckpt"
    run.save_checkpoint(path)
    fresh, plain = Module(), L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    results = {}
    for name, tester in {"plugin": trainer(tmp_path), "plain": plain}.items():
        results[name] = tester.test(fresh, loader(), ckpt_path=path, verbose=False)[0]["test_loss"]
        assert tester.validate(fresh, loader(), ckpt_path=path, verbose=False)
        assert len(tester.predict(fresh, loader(), ckpt_path=path)) == 3
    for name, value in module.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])
    assert results["plugin"] == pytest.approx(results["plain"], rel=0.1)


def test_param_groups_keep_their_own_rates(tmp_path):
    def optimizer(module):
        return torch.optim.SGD(
            [{"params": module.net[0].parameters()}, {"params": module.net[2].parameters(), "lr": 0.0}], lr=0.1
        )

    plugin, module = LowPrecisionSGLD(seed=0, temperature=0.0), Module(optimizer=optimizer)
    still = quantize(module.net[2].weight.detach().clone(), "bfp8", rounding="nearest")
    run = fit(tmp_path, module, plugin)
    assert [g["lr"] for g in run.optimizers[0].param_groups] == [0.1, 0.0]
    assert torch.equal(module.net[2].weight, still), "lr = 0 at T = 0 must not move a weight"


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_before_they_are_rounded(tmp_path, algorithm):
    """With lr = 1, T = 0 and no rounding of the weights, a step is as long as the clipped gradient."""
    plugin = LowPrecisionSGLD(weights=None, gradients=None, activations=None, errors=None, temperature=0.0, seed=0)
    module = Module(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    fit(tmp_path, module, plugin, max_steps=1, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    moved = torch.cat([p.detach().flatten() for p in module.parameters()]) - before
    length = moved.norm() if algorithm == "norm" else moved.abs().max()
    assert 0.9e-3 < float(length) < 1.1e-3


def test_accumulated_batches_make_one_step(tmp_path):
    plugin = LowPrecisionSGLD(seed=0)
    run = fit(tmp_path, Module(), plugin, accumulate_grad_batches=3)
    assert run.global_step == 2
    assert run.optimizers[0].steps == 2


def test_frozen_tied_and_unused_parameters(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.head = nn.Linear(6, 3)
            self.head.bias.requires_grad_(False)

        def forward(self, x):
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    module = Module(Odd())
    frozen, unused = module.net.head.bias.detach().clone(), module.net.unused.weight.detach().clone()
    fit(tmp_path, module)
    assert module.net.second.weight is module.net.first.weight
    rounded = quantize(frozen, "bfp8", rounding="nearest")
    assert torch.equal(module.net.head.bias, frozen) or torch.equal(module.net.head.bias, rounded)
    assert torch.equal(module.net.unused.weight, quantize(unused, "bfp8", rounding="nearest"))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0][:, -1])


def vision(name):
    import torchvision

    return getattr(torchvision.models, name)(num_classes=3)


@pytest.mark.parametrize(
    ("net", "data"),
    [
        (lambda: vision("resnet18"), {"shape": (3, 32, 32), "count": 8, "batch_size": 4}),
        (lambda: vision("mobilenet_v3_small"), {"shape": (3, 32, 32), "count": 8, "batch_size": 4}),
        (Transformer, {"shape": (5,), "sequence_of": 11}),
        (Recurrent, {"shape": (5,), "sequence_of": 11}),
    ],
    ids=["resnet18", "mobilenet_v3", "transformer", "lstm"],
)
def test_architectures(tmp_path, net, data):
    module = Module(net())
    run = fit(tmp_path, module, data=loader(**data), max_epochs=1, limit_val_batches=0)
    assert on_grid(module.parameters())
    assert run.precision_plugin.card.casts > 0


def test_bf16_autocast(tmp_path):
    seen = set()

    class Spy(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.add(out.dtype)
            return out

    module = Module(nn.Sequential(Spy(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    fit(tmp_path, module, LowPrecisionSGLD(seed=0, compute="bf16-mixed"), max_epochs=1)
    assert seen == {torch.bfloat16}


def test_manual_optimization_that_steps_our_sampler_works(tmp_path):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            opt.step()

    run = fit(tmp_path, Manual())
    assert run.optimizers[0].steps == 6


def test_the_module_is_the_users_again_after_fit(tmp_path):
    """No hooks are left behind: the forward pass of the fitted module is that of a copy that never saw the plugin."""
    module = Module()
    fit(tmp_path, module)
    clean = Module()
    clean.load_state_dict(module.state_dict())
    x = next(iter(loader()))[0]
    assert torch.equal(module(x), clean(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
