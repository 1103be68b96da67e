"""What a checkpoint remembers of a sampler: every argument that makes another chain, as plain values."""

import inspect

import pytest
import torch
from test_sampler_protocol import OPTIONS, SAMPLERS, build

from lightning_lpsgld.samplers import CyclicalStepSize, PolynomialStepSize
from lightning_lpsgld.samplers.step_size import schedule_from_settings, schedule_settings

#: Arguments that are no settings, with the reason.
NOT_SETTINGS = {
    "params": "the weights themselves",
    "seed": "the run's; it is compared by the plugin",
    "backend": "backends draw the same",
    "full_precision": "parameters; the plugin knows their names",
    "check_finite": "changes no step that is made",
    "check_mu": "changes no step that is made",
}
CALLED = {"weight_format": "weights", "gradient_format": "gradients", "word_length": "offset_format"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_argument_of_every_sampler_is_among_its_settings(name):
    opt = build(name)[2]
    wanted = {CALLED.get(arg, arg) for arg in inspect.signature(SAMPLERS[name]).parameters} - NOT_SETTINGS.keys()
    assert wanted <= opt.settings().keys(), sorted(wanted - opt.settings().keys())


@pytest.mark.parametrize("name", SAMPLERS)
def test_settings_are_plain_and_survive_steps_and_schedulers(name):
    _, _, opt = build(name)
    before = opt.settings()
    plain = (str, int, float, bool, type(None), dict, tuple)
    assert all(isinstance(value, plain) for value in before.values())
    torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
    opt.param_groups[0]["lr"] *= 0.1
    opt.param_groups[0]["step"] = 5
    assert opt.settings() == before


def test_groups_that_differ_are_shown_one_by_one():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": [weights[0]], "weight_decay": 0.1}, {"params": [weights[1]]}]
    found = SAMPLERS["SGLD"](groups, 0.2, num_data=10, **OPTIONS["SGLD"]).settings()
    assert (found["weight_decay"], found["lr"]) == ((0.1, 0.0), 0.2)


@pytest.mark.parametrize(
    "schedule", [CyclicalStepSize(7, 2), CyclicalStepSize.spread(100, 7), PolynomialStepSize(3.0, 0.6)]
)
def test_schedules_come_back_from_their_settings(schedule):
    assert schedule_from_settings(schedule_settings(schedule)) == schedule
