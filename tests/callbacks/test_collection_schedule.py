"""Which steps give a sample, against the definition."""

import itertools

import pytest

from lightning_lpsgld.callbacks import CollectionSchedule
from lightning_lpsgld.samplers import CyclicalStepSize


def by_definition(total, start, every, per_cycle=None, cycle_length=None):
    kept = set()
    if per_cycle is None:
        return set(range(start + every, total + 1, every))
    for end in range(cycle_length, total + cycle_length, cycle_length):
        kept |= {end - i * every for i in range(per_cycle)}
    return {s for s in kept if start < s <= total}


@pytest.mark.parametrize(("start", "every"), itertools.product((0, 1, 7), (1, 2, 5)))
def test_thinning_counts_from_the_end_of_burn_in(start, every):
    schedule = CollectionSchedule(start, every)
    assert {s for s in range(31) if schedule.due(s)} == by_definition(30, start, every)


@pytest.mark.parametrize(("start", "every", "per_cycle"), itertools.product((0, 9), (1, 3), (1, 2, 3)))
def test_last_samples_of_each_cycle_end_with_the_cycle(start, every, per_cycle):
    schedule = CollectionSchedule(start, every, per_cycle, cycle_length=8)
    assert {s for s in range(31) if schedule.due(s)} == by_definition(30, start, every, per_cycle, 8)


@pytest.mark.parametrize(("start", "every", "per_cycle"), itertools.product((0, 3, 11), (1, 4), (None, 1, 2)))
def test_hopeless_exactly_if_no_later_step_is_due(start, every, per_cycle):
    schedule = CollectionSchedule(start, every, per_cycle, cycle_length=None if per_cycle is None else 6)
    for taken, total in itertools.product(range(0, 20, 3), range(20)):
        expected = not any(schedule.due(s) for s in range(taken + 1, total + 1))
        assert schedule.hopeless(taken, total) == expected, (taken, total)
    assert not schedule.hopeless(5, float("inf"))


def test_epochs_within_a_cycle():
    schedule = CollectionSchedule(0, "epoch", per_cycle=2, cycle_length=30, epoch_length=10)
    assert [s for s in range(10, 61, 10) if schedule.due(s)] == [20, 30, 50, 60]


def test_cycles_of_unequal_length_end_with_their_last_samples():
    cycles = CyclicalStepSize.spread(100, 7)
    schedule = CollectionSchedule(every=2, per_cycle=2, cycle_length=cycles.cycle_length, cycles=cycles)
    ends = [14, 28, 42, 57, 71, 85, 100]
    assert [s for s in range(101) if schedule.due(s)] == sorted(set(ends) | {e - 2 for e in ends})
    assert [schedule.cycle(s) for s in ends] == list(range(7))


def test_steps_are_numbered_into_cycles():
    schedule = CollectionSchedule(every=1, per_cycle=1, cycle_length=4)
    assert [schedule.cycle(s) for s in (0, 1, 4, 5, 8, 9)] == [None, 0, 0, 1, 1, 2]
    assert CollectionSchedule().cycle(3) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "`start` must be >= 0"),
        ({"every": 0}, "`every` must be an int >= 1 or 'epoch', got 0"),
        ({"per_cycle": 0, "cycle_length": 5}, "`per_cycle` must be >= 1"),
        ({"per_cycle": 2}, "needs a cycle length"),
        ({"per_cycle": 3, "every": 5, "cycle_length": 10}, "do not fit into a cycle of 10 steps"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CollectionSchedule(**options)
