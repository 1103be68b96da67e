"""The finite check as accelerators do it: read one step late. Forced here on a CPU, where the flags are the same."""

import contextlib
import copy
import math

import pytest
import torch
from test_sampler_protocol import SAMPLERS, build, closure_of

from lightning_lpsgld.samplers import SGLD, finite


@pytest.fixture(autouse=True)
def late(monkeypatch):
    monkeypatch.setattr(finite, "reads_late", lambda device: True)


def poisoned(net, x, opt):
    def closure():
        loss = closure_of(net, x, opt)()
        next(net.parameters()).grad[0] = math.nan
        return loss

    return closure


def started(name):
    net, x, opt = build(name)
    opt.name_parameters(net.named_parameters())
    good = closure_of(net, x, opt)
    if hasattr(opt, "recentre"):
        opt.recentre(good)
    opt.step(good)
    return net, opt, good, poisoned(net, x, opt)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_next_step_names_the_one_that_was_bad_and_does_not_claim_to_have_refused_it(name):
    _, opt, good, bad = started(name)
    words = r"^The gradient of weight is NaN or infinite at step 1, .*after the step was made.*the weights hold it now"
    with pytest.raises(FloatingPointError, match=words) as seen:  # noqa: PT012
        opt.step(bad)  # without a fused step the preconditioned sampler stumbles over the NaN here, and says the same
        assert opt.unsettled
        opt.step(good)
    assert "refused" not in str(seen.value)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_state_is_given_out_once_a_bad_step_was_made(name):
    net, opt, good, bad = started(name)
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    with contextlib.suppress(FloatingPointError):
        opt.step(bad)
    for _ in range(2):  # again: what handles the error may try to save, too
        with pytest.raises(FloatingPointError, match="at step 1"):
            opt.state_dict()
    with pytest.raises(FloatingPointError, match="at step 1"):
        opt.step(good)
    net.load_state_dict(weights)
    opt.load_state_dict(saved)
    opt.step(good)
    opt.settle()
    assert all(param.isfinite().all() for param in net.parameters())
    assert opt.state_dict()["param_groups"][0]["step"] == 2


def test_the_last_step_is_settled_in_a_plain_loop():
    _, opt, _, bad = started("SGLD")
    opt.settle()
    assert not opt.unsettled
    opt.step(bad)
    with pytest.raises(FloatingPointError, match="at step 1"):
        opt.settle()


def test_a_loss_that_alone_is_bad_is_found_late():
    weight = torch.nn.Parameter(torch.ones(3))
    opt = SGLD([weight], 0.1, num_data=10)

    def closure():
        weight.grad = torch.ones(3)
        return torch.tensor(math.inf)

    opt.step(closure)
    with pytest.raises(FloatingPointError, match="The loss is NaN or infinite at step 0"):
        opt.settle()


def test_a_bad_full_gradient_is_no_centre_although_steps_are_read_late():
    net, x, opt = build("SVRG")
    with pytest.raises(FloatingPointError, match="at step 0"):
        opt.recentre(poisoned(net, x, opt))
    assert not opt.centred


def test_good_steps_are_the_same_chain_late_or_at_once(monkeypatch):
    def run(reads_late):
        monkeypatch.setattr(finite, "reads_late", lambda device: reads_late)
        net, opt, good, _ = started("SGLD")
        for _ in range(5):
            opt.step(good)
        opt.settle()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(run(True), run(False))
