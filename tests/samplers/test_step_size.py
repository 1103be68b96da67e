"""Step-size schedules against their formulas."""

import math

import pytest
import torch

from lightning_lpsgld.samplers import SGLD, ConstantStepSize, CyclicalStepSize, PolynomialStepSize, StepSize


@pytest.mark.parametrize("schedule", [ConstantStepSize(), PolynomialStepSize(10.0), CyclicalStepSize(10, 3)], ids=repr)
def test_every_schedule_starts_at_factor_one_and_never_leaves_the_unit_interval(schedule):
    assert isinstance(schedule, StepSize)
    assert schedule.factor(0) == 1.0
    assert all(0.0 < schedule.factor(k) <= 1.0 for k in range(1000))


def test_cyclical_factor_is_the_published_cosine():
    """Published: lr_k = lr0/2 [cos(pi mod(k, K//M) / (K//M)) + 1]."""
    schedule = CyclicalStepSize(cycle_length=35)
    for k in range(200):
        assert schedule.factor(k) == 0.5 * (math.cos(math.pi * (k % 35) / 35) + 1.0)
        assert schedule.cycle(k) == k // 35


@pytest.mark.parametrize(("steps", "cycles"), [(100, 7), (10, 6), (12, 4), (5, 5), (1000, 7), (9, 1)])
def test_spread_cycles_fill_the_run_and_end_with_it(steps, cycles):
    """M cycles and no further one, of C = ceil(K/M) steps or one less; each is the cosine over its own length."""
    schedule = CyclicalStepSize.spread(steps, cycles)
    assert schedule.cycle_length == math.ceil(steps / cycles)
    numbers = [schedule.cycle(k) for k in range(steps)]
    lengths = [numbers.count(j) for j in range(cycles)]
    assert sum(lengths) == steps
    assert set(lengths) <= {schedule.cycle_length, schedule.cycle_length - 1}
    assert min(lengths) == schedule.shortest
    assert numbers == sorted(numbers)
    for j, length in enumerate(lengths):
        first = schedule.first(j)
        expected = [0.5 * (math.cos(math.pi * i / length) + 1.0) for i in range(length)]
        assert [schedule.factor(first + i) for i in range(length)] == expected
        assert [schedule.remaining(first + i) for i in range(length)] == list(range(length))[::-1]
    assert schedule.sampling(steps - 1)
    assert (schedule.cycle(steps), schedule.factor(steps)) == (cycles, 1.0)  # a run that goes on begins another one


def test_sampling_stage_is_the_end_of_each_cycle_and_gates_the_noise_only_when_asked():
    always = CyclicalStepSize(10, sampling_steps=3)
    gated = CyclicalStepSize(10, sampling_steps=3, noise_in="sampling-stage")
    stage = [k % 10 >= 7 for k in range(40)]
    assert [gated.sampling(k) for k in range(40)] == stage
    assert [gated.noise(k) for k in range(40)] == stage
    assert all(always.noise(k) for k in range(40))


def test_polynomial_decay_matches_its_formula():
    schedule = PolynomialStepSize(offset=500.0, power=0.55)
    assert schedule.factor(1500) == pytest.approx(4.0**-0.55, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CyclicalStepSize(0), "`cycle_length` >= 1"),
        (lambda: CyclicalStepSize(5, sampling_steps=6), "`sampling_steps` <= `cycle_length`"),
        (lambda: CyclicalStepSize(5, noise_in="never"), "'every-step' or 'sampling-stage', got 'never'"),
        (lambda: CyclicalStepSize.spread(100, 7, sampling_steps=15), r"`cycle_length` - 1 \(of the shorter cycles\)"),
        (lambda: CyclicalStepSize.spread(3, 4), "`cycles` <= `total_steps`, got 4 and 3"),
        (lambda: CyclicalStepSize(5, cycles=2), "both or neither of `cycles` and `total_steps`"),
        (lambda: CyclicalStepSize(14, cycles=7, total_steps=100), "`total_steps` / `cycles` rounded up"),
        (lambda: PolynomialStepSize(0.0), "`offset` > 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_the_gate_of_the_noise_opens_at_the_first_step_of_the_sampling_stage():
    """Cycles of 5 with a stage of 2, counted by hand; and the very steps at which weights of zero gradient move."""
    schedule = CyclicalStepSize(5, sampling_steps=2, noise_in="sampling-stage")
    by_hand = [False, False, False, True, True] * 2
    assert [schedule.noise(k) for k in range(10)] == by_hand
    param, moved = torch.nn.Parameter(torch.zeros(64)), []
    opt = SGLD([param], 0.1, num_data=10, schedule=schedule)
    for _ in by_hand:
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        opt.step()
        moved.append(not torch.equal(param, before))
    assert moved == by_hand
