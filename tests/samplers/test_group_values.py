"""Values that a scheduler, a callback or a schedule sets are refused before anything changes, in every sampler."""

import inspect
import math

import pytest
import torch
from test_sampler_protocol import OPTIONS, SAMPLERS

from lightning_lpsgld.samplers import HALP, SGHMC, SGLD, SVRG, CyclicalStepSize, PreconditionedSGLD

#: Every sampler, and those that have one with a full accumulator.
ROWS = [(name, accumulator) for name in SAMPLERS for accumulator in ("low", "full")]
ROWS = [row for row in ROWS if row[1] == "low" or "accumulator" in inspect.signature(SAMPLERS[row[0]]).parameters]
OWN = {"SGHMC": {"friction": -1.0}, "PreconditionedSGLD": {"beta": 1.5, "eps": 0.0}, "HALP": {"mu": math.nan}}


def build(name, accumulator):
    options = {**OPTIONS.get(name, {})}
    if accumulator == "full":
        options["accumulator"] = "full"
        options.pop("velocity_format", None)
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    opt = SAMPLERS[name]([weight], 0.01, num_data=100, temperature=0.1, seed=7, **options)

    def closure():
        opt.zero_grad()
        loss = (weight - 0.3).square().sum()
        loss.backward()
        return loss

    if hasattr(opt, "recentre"):
        opt.recentre(closure)
    opt.step(closure)
    return weight, opt, closure


def snapshot(weight, opt):
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state[weight].items()}
    return weight.detach().clone(), state, opt.steps


def assert_unchanged(weight, opt, before):
    value, state, steps = before
    assert torch.equal(weight, value)
    assert opt.steps == steps
    assert opt.state[weight].keys() == state.keys()
    for name, old in state.items():
        now = opt.state[weight][name]
        assert torch.equal(now, old) if isinstance(old, torch.Tensor) else now == old, name


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1", None])
@pytest.mark.parametrize("option", ["lr", "temperature", "weight_decay"])
@pytest.mark.parametrize(("name", "accumulator"), ROWS)
def test_a_value_that_was_set_is_refused_before_anything_changes(name, accumulator, option, value):
    weight, opt, closure = build(name, accumulator)
    before = snapshot(weight, opt)
    good = opt.param_groups[0][option]
    opt.param_groups[0][option] = value
    with pytest.raises((ValueError, TypeError), match=rf"group 0, before step 1 \(nothing.*`{option}` must be") as seen:
        opt.step(closure)
    assert type(seen.value) is (ValueError if isinstance(value, float) else TypeError)
    assert_unchanged(weight, opt, before)
    opt.param_groups[0][option] = good
    opt.step(closure)
    assert opt.steps == 2
    assert weight.isfinite().all()


@pytest.mark.parametrize(("name", "accumulator"), ROWS)
def test_a_value_that_is_set_inside_the_closure_is_refused_too(name, accumulator):
    """Hooks of a trainer (``on_before_optimizer_step``) run there."""
    weight, opt, closure = build(name, accumulator)
    before = snapshot(weight, opt)

    def sets():
        loss = closure()
        opt.param_groups[0]["lr"] = math.nan
        return loss

    with pytest.raises(ValueError, match="`lr` must be finite and >= 0, got nan"):
        opt.step(sets)
    assert_unchanged(weight, opt, before)


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in OWN.items() for option in options])
def test_options_of_one_sampler_are_checked_in_every_step_too(name, option):
    weight, opt, closure = build(name, "low")
    before = snapshot(weight, opt)
    opt.param_groups[0][option] = OWN[name][option]
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        opt.step(closure)
    assert_unchanged(weight, opt, before)


@pytest.mark.parametrize("seed", [1.5, -1, 2**64, True, "7"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_seeds_that_would_be_taken_for_another_are_refused(name, seed):
    weight, opt, closure = build(name, "low")
    with pytest.raises((TypeError, ValueError), match=r"`seed` must be an int in \[0, 2\*\*64\), got"):
        type(opt)([weight], 0.1, num_data=10, seed=seed, **OPTIONS.get(name, {}))
    before = snapshot(weight, opt)
    opt.param_groups[0]["seed"] = seed
    with pytest.raises((TypeError, ValueError), match="`seed` must be an int"):
        opt.step(closure)
    assert_unchanged(weight, opt, before)


def test_a_state_that_was_saved_with_a_negative_seed_goes_on_with_its_draws():
    _, opt, _ = build("SGLD", "low")
    state = opt.state_dict()
    state["param_groups"][0]["seed"] = -1
    opt.load_state_dict(state)
    assert opt.key(opt.param_groups[0]).seed == 2**64 - 1


class Broken:
    """A schedule whose factor is what a mistake would make it."""

    def __init__(self, factor):
        self.value = factor

    def factor(self, step):
        return self.value if step else 1.0

    def noise(self, step):
        return True


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_schedule_that_gives_no_step_size_is_refused(name, factor):
    weight, opt, closure = build(name, "low")
    before = snapshot(weight, opt)
    opt.schedule = Broken(factor)
    with pytest.raises(ValueError, match="the schedule's factor must be finite and >= 0"):
        opt.step(closure)
    assert_unchanged(weight, opt, before)


def test_a_refused_group_is_not_added():
    _, opt, _ = build("SGLD", "low")
    other = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="`lr` must be finite and >= 0, got -1"):
        opt.add_param_group({"params": [other], "lr": -1.0})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [other], "lr": 0.1})
    assert opt.index_of(other) == 1


W = torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SGLD([W], "0.1", num_data=1), "`lr` must be a number, got '0.1'"),
        (lambda: SGLD([W], 0.1, num_data=1, temperature="1"), "`temperature` must be a number, got '1'"),
        (lambda: SGLD([W], 0.1, num_data=1, temperature=1j), "`temperature` must be a number"),
        (lambda: SGLD([W], 0.1, num_data=1, weight_decay=True), "`weight_decay` must be a number, got True"),
        (lambda: SGLD([W], 0.1, num_data=1, schedule=5), "`schedule` must be a step-size schedule.*got 5"),
        (lambda: SGLD([W], 0.1, num_data=1, schedule=CyclicalStepSize), "`schedule` must be a step-size schedule"),
        (lambda: SGLD([W], 0.1, num_data=1, variance_corrected="no"), "`variance_corrected` must be True or False"),
        (lambda: SGLD([W], 0.1, num_data=1, check_finite=1), "`check_finite` must be True or False, got 1"),
        (lambda: SGHMC([W], 0.1, num_data=1, friction="2"), "`friction` must be a number"),
        (lambda: PreconditionedSGLD([W], 0.1, num_data=1, beta=None), "`beta` must be a number, got None"),
        (lambda: HALP([W], 0.1, mu="1"), "`mu` must be a number, got '1'"),
        (lambda: HALP([W], 0.1, mu=1.0, word_length="8"), "`word_length` must be an int in"),
        (lambda: SVRG([W], 0.1, period=2.0), "`period` must be an int >= 1 .*got 2.0"),
        (lambda: CyclicalStepSize("3"), "`cycle_length` must be an int, got '3'"),
        (lambda: CyclicalStepSize(2.5), "`cycle_length` must be an int, got 2.5"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_an_unknown_backend_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match=r"`backend` must be 'auto', 'reference'.*got 'gpu'"):
        SGLD([W], 0.1, num_data=1, backend="gpu")


@pytest.mark.parametrize("fmt", [None, "bfp8"])
def test_numbers_of_numpy_and_tensors_of_one_element_are_numbers(fmt):
    np = pytest.importorskip("numpy")
    weight = torch.nn.Parameter(torch.ones(2, 2))
    opt = SGLD(
        [weight], torch.tensor(0.1), num_data=1, temperature=np.float32(0.5), weight_format=fmt, seed=np.int64(3)
    )
    weight.grad = torch.ones(2, 2)
    opt.step()
    assert opt.steps == 1
