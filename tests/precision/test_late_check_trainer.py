"""On an accelerator a NaN is known one step late; no checkpoint, sample or normal end comes of it. Simulated."""

import copy
import pickle

import pytest
import torch
from helpers.models import Classifier, SyntheticData, make_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_lpsgld import LowPrecisionSGLD, SampleBank, SampleCollector
from lightning_lpsgld.samplers import finite

STEPS = 6


@pytest.fixture(autouse=True)
def late(monkeypatch):
    monkeypatch.setattr(finite, "reads_late", lambda device: True)


class Breaks(Callback):
    """A NaN in a gradient at one step."""

    def __init__(self, step):
        self.step = step

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step:
            module.net[0].weight.grad[0, 0] = float("nan")


def fit(step, *callbacks, after=None, **options):
    torch.manual_seed(0)
    module = Classifier(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    trainer = make_trainer(
        max_epochs=-1, max_steps=STEPS, plugins=[LowPrecisionSGLD(seed=1)], callbacks=[Breaks(step), *callbacks],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), limit_val_batches=0, **options,
    )  # fmt: skip
    trainer.fit(module, SyntheticData())
    return module, trainer


@pytest.mark.parametrize("weights_only", [False, True])
def test_no_checkpoint_holds_a_nan(tmp_path, weights_only):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only)
    with pytest.raises(FloatingPointError, match=r"net\.0\.weight is NaN or infinite at step 3.*weights hold it now"):
        fit(3, saver)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for file in files:
        weights = torch.load(file, weights_only=False)["state_dict"]
        assert all(value.isfinite().all() for value in weights.values()), file


def test_no_sample_holds_a_nan(tmp_path):
    with pytest.raises(FloatingPointError, match="at step 3"):
        fit(3, SampleCollector(tmp_path / "bank", every=1))
    bank = SampleBank.open(tmp_path / "bank")
    assert bank.steps == [1, 2, 3]
    assert all(t.isfinite().all() for sample in bank for t in sample.tensors.values())


def test_a_nan_at_the_last_step_is_no_normal_end():
    with pytest.raises(FloatingPointError, match=f"at step {STEPS - 1}"):
        fit(STEPS - 1)


def test_what_saves_when_a_run_fails_saves_no_nan_and_hides_no_error(tmp_path):
    """As ``OnExceptionCheckpoint`` does."""
    seen = []

    class SavesOnException(Callback):
        def on_exception(self, trainer, module, exception):
            seen.append(exception)
            trainer.save_checkpoint(tmp_path / "broken.ckpt")

    with pytest.raises(FloatingPointError, match="at step 2"):
        fit(2, SavesOnException())
    assert isinstance(seen[0], FloatingPointError)
    assert not (tmp_path / "broken.ckpt").exists()


def test_another_error_is_not_hidden_by_a_nan_found_at_the_end():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                raise ZeroDivisionError("the user's own")

    with pytest.raises(ZeroDivisionError, match="the user's own"):
        fit(2, Fails())


def test_a_run_without_nan_is_left_alone_and_so_is_the_module(tmp_path):
    hooks = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            hooks.append(len(module._state_dict_pre_hooks))
            copy.deepcopy(module._state_dict_pre_hooks)
            pickle.loads(pickle.dumps(list(module._state_dict_pre_hooks.values())))

    module, trainer = fit(-1, Copies())
    assert hooks == [1] * STEPS
    assert not module._state_dict_pre_hooks
    assert trainer.global_step == STEPS
    assert all(value.isfinite().all() for value in module.state_dict().values())
