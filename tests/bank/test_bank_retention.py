"""Banks of limited capacity: what they keep, and that a resumed run keeps the same."""

import itertools

import pytest
import torch
from bank_samples import Net, assert_holds, fill, filled_bank
from helpers.stats import assert_means_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.bank.retention import kept_arrivals
from lightning_lpsgld.random import DrawKey, Role, stream_id, words

POLICIES = ("thin", "reservoir", "last")


def add_steps(bank, steps, chain=0):
    """Tiny samples, so that many fit into a test."""
    module = nn.Linear(1, 1, bias=False)
    for step in steps:
        with torch.no_grad():
            module.weight.fill_(float(step))
        bank.add(module, step=step, chain=chain)
    return bank


def values(bank):
    return [(s.chain, s.step, s.tensors["values.weight"].item()) for s in bank]


def reservoir_by_hand(arrivals, capacity, seed):
    """Algorithm R in plain Python on the documented draws."""
    slots = []
    for n in range(arrivals):
        word = int(words((1,), DrawKey(seed, step=0, stream=stream_id(Role.SAMPLE, 0), offset=n)))
        if n < capacity:
            slots.append(n)
        elif (slot := word * (n + 1) // 2**32) < capacity:
            slots[slot] = n
    return set(slots)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_reservoir_is_algorithm_r(seed):
    for arrivals, capacity in itertools.product((0, 1, 5, 63, 64, 65, 200), (1, 4, 7)):
        assert kept_arrivals(arrivals, capacity, "reservoir", seed=seed) == reservoir_by_hand(arrivals, capacity, seed)


def test_the_reservoir_is_uniform():
    """Every one of three arrivals is the one kept with probability 1/3.

    Means of indicators over 2000 seeds; a bias of 0.15 goes unnoticed with probability below 1e-6. (Drawing the slot
    from n instead of n + 1 numbers shifts a probability by 0.33.) Larger cases follow from the exact test above.
    """
    kept = torch.zeros(2000, 3, dtype=torch.float64)
    for seed in range(len(kept)):
        kept[seed, list(kept_arrivals(3, 1, "reservoir", seed=seed))] = 1.0
    assert_means_equal(kept, 1.0 / 3.0, width=1.0, detect=0.15)


@given(st.integers(0, 500), st.integers(1, 20), st.sampled_from(POLICIES))
@settings(max_examples=200, deadline=None)
def test_capacity_is_kept_and_what_was_dropped_stays_dropped(arrivals, capacity, policy):
    """Invariant: at most ``capacity``; and the kept of n+1 are among the kept of n and the newcomer."""
    kept, later = kept_arrivals(arrivals, capacity, policy), kept_arrivals(arrivals + 1, capacity, policy)
    assert len(kept) == min(arrivals, capacity) or policy == "thin"
    assert 0 < len(later) <= capacity
    assert later <= kept | {arrivals}


def test_thinning_stays_spread_over_the_chain():
    assert sorted(kept_arrivals(100, 10, "thin")) == list(range(0, 100, 16))
    assert len(kept_arrivals(2**20, 10, "thin")) > 5


@pytest.mark.parametrize("place", ["memory", "directory"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_bank_drops_by_its_policy(policy, place, tmp_path):
    bank = SampleBank(None if place == "memory" else tmp_path / "b", capacity=4, policy=policy, seed=3)
    add_steps(bank, range(0, 110, 10))
    kept = kept_arrivals(11, 4, policy, seed=3)
    assert values(bank) == [(0, 10 * n, 10.0 * n) for n in sorted(kept)]
    if place == "directory":
        assert values(SampleBank.open(tmp_path / "b")) == values(bank)
        assert len(list((tmp_path / "b").glob("*.safetensors"))) == len(kept)


def test_capacity_is_per_chain():
    bank = SampleBank(capacity=2, policy="last")
    for chain in (0, 1):
        add_steps(bank, range(5), chain)
    assert [(s.chain, s.step) for s in bank] == [(0, 3), (0, 4), (1, 3), (1, 4)]


def test_add_says_when_a_sample_is_passed_over():
    bank = SampleBank(capacity=1, policy="thin")
    module = nn.Linear(1, 1)
    assert bank.add(module, step=0) is not None
    assert bank.add(module, step=1) is None
    assert bank.steps == [0]


@given(
    policy=st.sampled_from(POLICIES),
    capacity=st.one_of(st.none(), st.integers(1, 6)),
    total=st.integers(1, 40),
    checkpoint=st.integers(0, 40),
    crash=st.integers(0, 40),
    again=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_cut_back_and_repeated_is_as_if_uninterrupted(policy, capacity, total, checkpoint, crash, again):
    """Invariant: whatever the policy, checkpoint and crash, the repeated run's bank equals the uninterrupted one's."""
    crash = min(crash, total)
    checkpoint = min(checkpoint, crash)
    whole = add_steps(SampleBank(capacity=capacity, policy=policy, seed=1), range(total))
    bank = add_steps(SampleBank(capacity=capacity, policy=policy, seed=1), range(crash))
    bank.truncate(checkpoint - 1)
    assert all(step < checkpoint for step in bank.steps)
    if again:  # a second crash, to the same checkpoint
        add_steps(bank, range(checkpoint, crash))
        bank.truncate(checkpoint - 1)
    add_steps(bank, range(checkpoint, total))
    assert values(bank) == values(whole)
    assert bank.state_dict()["manifest"]["arrivals"] == whole.state_dict()["manifest"]["arrivals"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_durable_bank_resumes_from_the_checkpoint_state(policy, tmp_path):
    options = {"capacity": 3, "policy": policy, "seed": 2}
    whole = add_steps(SampleBank(**options), range(30))
    bank = add_steps(SampleBank(tmp_path / "b", **options), range(12))
    checkpoint = bank.state_dict()
    add_steps(bank, range(12, 20)).close()
    resumed = SampleBank(tmp_path / "b", **options, exist_ok=True)
    resumed.load_state_dict(checkpoint)
    assert all(step < 12 for step in resumed.steps)
    add_steps(resumed, range(12, 30))
    assert values(SampleBank.open(tmp_path / "b")) == values(whole)


def test_a_sample_that_the_checkpoint_knew_and_that_is_gone_is_named(tmp_path, caplog):
    bank = add_steps(SampleBank(tmp_path / "b"), range(3))
    checkpoint = bank.state_dict()
    bank.close()
    next((tmp_path / "b").glob("*-s1-*")).unlink()
    SampleBank.open(tmp_path / "b").load_state_dict(checkpoint)
    assert "lacks samples (chain, step) that the checkpoint knew: [(0, 1)]" in caplog.text


def test_the_same_chain_and_step_replaces(tmp_path):
    bank = filled_bank(tmp_path / "b", (1, 2, 3))
    bank.add(fill(Net(), 9), step=2, formats="bfp8")
    bank = SampleBank.open(tmp_path / "b")
    assert bank.steps == [1, 2, 3]
    bank.load_into(net := Net(), 1)
    assert torch.equal(net.fc.weight, fill(Net(), 9).fc.weight)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 3


def test_merging_keeps_or_renumbers_chains(tmp_path):
    one, two = filled_bank(tmp_path / "1", (1, 2)), filled_bank(tmp_path / "2", (2, 3))
    with pytest.raises(BankError, match=r"chain 0, step 2\. Use chains='renumber'"):
        one.merge(two)
    merged = SampleBank.merged([tmp_path / "1", two], into=tmp_path / "all")
    assert [(i.chain, i.step) for i in merged.infos] == [(0, 1), (0, 2), (1, 2), (1, 3)]
    assert_holds(SampleBank.open(tmp_path / "all"), (1, 2, 2, 3))
    one.truncate(1)
    one.merge(two)
    assert [(i.chain, i.step) for i in one.infos] == [(0, 1), (0, 2), (0, 3)]
    assert_holds(SampleBank.open(tmp_path / "2"), (2, 3))


def test_merging_another_module_is_refused():
    with pytest.raises(BankError, match="another module"):
        filled_bank(None, (1,)).merge(add_steps(SampleBank(), (1,)))
    with pytest.raises(BankError, match="`chains`"):
        filled_bank(None, (1,)).merge(filled_bank(None, (2,)), chains="join")


def test_merging_an_empty_bank_changes_nothing():
    bank = filled_bank(None, (1,))
    bank.merge(SampleBank())
    assert_holds(bank, (1,))
