"""What every sampler of the package promises, one test per promise, over all that ``samplers.__all__`` exports.

A new sampler joins by being exported; one that needs more arguments than ``num_data`` is named in ``OPTIONS``. So do
two toys that a user could have written, and samplers on a toy format.
"""

import inspect
import io

import pytest
import torch
from helpers.toy_format import BlockLogarithmic
from helpers.toy_sampler import FloatToy, GridToy

from lightning_lpsgld import samplers
from lightning_lpsgld.samplers import LangevinOptimizer, VarianceReduced

SAMPLERS = {
    name: member
    for name in samplers.__all__
    if inspect.isclass(member := getattr(samplers, name))
    and issubclass(member, LangevinOptimizer)
    and not getattr(member.update, "__isabstractmethod__", False)
} | {"FloatToy": FloatToy, "GridToy": GridToy, "SGLD on a toy": samplers.SGLD, "SGHMC on a toy": samplers.SGHMC}

#: What a sampler needs or is worth trying with, beside ``num_data``.
OPTIONS = {
    "SGHMC": {"friction": 2.0, "weight_format": "bfp8", "velocity_format": "bfp8"},
    "SGLD": {"weight_format": "bfp8", "gradient_format": "bfp8"},
    "PreconditionedSGLD": {"weight_format": "bfp8", "gradient_format": "bfp8"},
    "SVRG": {"weight_format": "bfp8"},
    "HALP": {"mu": 0.5},
    "GridToy": {"weight_format": "fixed16.12"},
    "SGLD on a toy": {"weight_format": BlockLogarithmic(4), "gradient_format": BlockLogarithmic(4)},
    "SGHMC on a toy": {"friction": 2.0, "weight_format": BlockLogarithmic(4), "velocity_format": BlockLogarithmic(4)},
}


def problem():
    net = torch.nn.Linear(5, 3)
    with torch.no_grad():
        for i, param in enumerate(net.parameters()):
            param.copy_(torch.linspace(-0.5, 0.5, param.numel()).reshape(param.shape) * (i + 1))
    return net, torch.linspace(-1, 1, 40).reshape(8, 5).sin()


def build(name, source=None):
    net, x = problem()
    options = {"num_data": 100, "temperature": 0.1, "seed": 7, **OPTIONS.get(name, {})}
    if source is not None:
        opt = SAMPLERS[name].from_optimizer(source(net.parameters()), **options)
    else:
        opt = SAMPLERS[name](net.parameters(), 0.01, **options)
    return net, x, opt


def closure_of(net, x, opt, calls=None):
    def closure():
        if calls is not None:
            calls.append([p.detach().clone() for p in net.parameters()])
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    return closure


def started(name, source=None):
    """A sampler that can be stepped: variance-reduced ones have a centre."""
    net, x, opt = build(name, source)
    if isinstance(opt, VarianceReduced):
        opt.recentre(closure_of(net, x, opt))
    return net, x, opt


def test_all_samplers_are_found():
    assert {"SGLD", "SGHMC", "PreconditionedSGLD", "SVRG", "HALP"} <= SAMPLERS.keys()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_closure_is_called_once_at_the_point_and_its_value_is_returned(name):
    """SVRG and HALP call it once more, at their centre, and return the value at the point."""
    net, x, opt = started(name)
    opt.step(closure_of(net, x, opt))
    here, calls = [p.detach().clone() for p in net.parameters()], []
    expected = net(x).square().mean()
    value = opt.step(closure_of(net, x, opt, calls))
    assert torch.equal(value, expected)
    assert len(calls) == (2 if isinstance(opt, VarianceReduced) else 1)
    assert all(torch.equal(a, b) for a, b in zip(calls[-1], here)), "the closure ran at another point"
    assert value.requires_grad, "the closure ran without gradients"


@pytest.mark.parametrize("name", [n for n, c in SAMPLERS.items() if not issubclass(c, VarianceReduced)])
def test_without_a_closure_the_gradients_present_are_used(name):
    nets = []
    for with_closure in (True, False):
        net, x, opt = started(name)
        closure = closure_of(net, x, opt)
        if with_closure:
            opt.step(closure)
        else:
            closure()
            assert opt.step() is None
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_move_and_do_not_touch_the_global_generators(name):
    net, x, opt = started(name)
    before, state = [p.detach().clone() for p in net.parameters()], torch.get_rng_state()
    for _ in range(5):
        opt.step(closure_of(net, x, opt))
    assert opt.steps == 5
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_equal_seeds_give_equal_chains_and_others_do_not(name):
    chains = []
    for seed in (7, 7, 8):
        net, x, opt = started(name)
        for group in opt.param_groups:
            group["seed"] = seed
        for _ in range(3):
            opt.step(closure_of(net, x, opt))
        chains.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(chains[0], chains[1])
    assert not torch.equal(chains[0], chains[2])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("source", [torch.optim.SGD, torch.optim.AdamW])
def test_from_optimizer_shares_the_groups_also_after_loading(name, source):
    made = []

    def make(params):
        made.append(source(params, lr=0.02, weight_decay=0.1))
        return made[0]

    net, x, opt = started(name, make)
    assert opt.param_groups is made[0].param_groups
    assert opt.param_groups[0]["lr"] == 0.02
    assert opt.param_groups[0]["weight_decay"] == 0.1
    assert opt.param_groups[0]["temperature"] == 0.1
    opt.step(closure_of(net, x, opt))
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is made[0].param_groups
    made[0].param_groups[0]["lr"] = 0.005
    assert opt.step_size(opt.param_groups[0]) == 0.005


@pytest.mark.parametrize("name", SAMPLERS)
def test_taking_over_a_sampler_starts_its_own_chain(name):
    """Options of the sampler taken over (seed, step, and its own extra ones) do not survive in the shared groups."""
    net, x, first = started(name)
    first.step(closure_of(net, x, first))
    options = {"num_data": 5, "temperature": 0.25, "seed": 3, **OPTIONS.get(name, {})}
    second = SAMPLERS[name].from_optimizer(first, **options)
    assert second.steps == 0
    assert (second.param_groups[0]["seed"], second.param_groups[0]["temperature"]) == (3, 0.25)


@pytest.mark.parametrize("name", SAMPLERS)
def test_state_makes_a_round_trip_through_a_file_and_the_chain_goes_on_bitwise(name):
    net, x, opt = started(name)
    for _ in range(3):
        opt.step(closure_of(net, x, opt))
    file = io.BytesIO()
    torch.save([net.state_dict(), opt.state_dict()], file)
    for _ in range(3):
        opt.step(closure_of(net, x, opt))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed, _, again = build(name)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    assert again.steps == 3
    for _ in range(3):
        again.step(closure_of(resumed, x, again))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters()))
    left, right = opt.state_dict()["state"], again.state_dict()["state"]
    assert left.keys() == right.keys()
    for number in left:
        assert left[number].keys() == right[number].keys()
        for key, value in left[number].items():
            other = right[number][key]
            same = (
                torch.equal(value, other) and value.dtype == other.dtype if torch.is_tensor(value) else value == other
            )
            assert same, f"state {key!r} of parameter {number} differs"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_non_finite_gradient_is_refused_and_changes_nothing(name):
    net, x, opt = started(name)
    opt.step(closure_of(net, x, opt))
    before = [p.detach().clone() for p in net.parameters()]

    def poisoned():
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        net.bias.grad[0] = float("nan")
        return loss

    with pytest.raises(FloatingPointError, match="NaN or infinite at step 1"):
        opt.step(poisoned)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert opt.steps == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_groups_that_are_assigned_anew_are_taken_over(name):
    """As Lightning's finetuning does on resuming: values count, counters and the list that others hold stay."""
    net, x, opt = started(name, lambda params: torch.optim.SGD([{"params": [p], "lr": 0.01} for p in params], 0.01))
    opt.step(closure_of(net, x, opt))
    held, seed = opt.source.param_groups, opt.param_groups[0]["seed"]
    extra = torch.nn.Parameter(torch.ones(3))
    changed = {**opt.param_groups[0], "lr": 0.005, "step": 0, "seed": 1}
    opt.param_groups = [changed, {"params": [extra], "lr": 0.02, "weight_decay": 0.0}]
    first, second = net.parameters()
    before = second.detach().clone()
    if isinstance(opt, VarianceReduced):
        opt.recentre(closure_of(net, x, opt))
    opt.step(closure_of(net, x, opt))
    assert opt.param_groups is held
    assert [[id(p) for p in group["params"]] for group in held] == [[id(first)], [id(extra)]]
    assert [group["lr"] for group in held] == [0.005, 0.02]
    assert [group["step"] for group in held] == [2, 2]
    assert {group["seed"] for group in held} == {seed}
    assert torch.equal(second, before), "a group that the new list lacks is not stepped"
