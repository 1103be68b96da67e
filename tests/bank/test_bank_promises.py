"""What a bank promises, as docs/durability.md states it, against a model in plain Python.

Runs start, append, take samples, save checkpoints, are killed in the middle of an addition, resume, are merged and
recovered, in any order that hypothesis finds. After every step the directory holds what the model says: nothing lost,
nothing mixed, nothing that came back.
"""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from lightning_lpsgld.bank import BankError, SampleBank

#: (examples, steps of each): what runs by default, and with ``-m slow``.
SHORT, LONG = (12, 25), (150, 50)


class Killed(BaseException):
    """What a killed process does not catch."""


class killed_at:
    """Let no call that changes the disk happen from call number ``at`` on."""

    CALLS = ("open", "fsync", "replace", "unlink", "write")

    def __init__(self, at):
        self.left = at

    def __enter__(self):
        self.calls = {name: getattr(os, name) for name in self.CALLS}
        for name, call in self.calls.items():
            setattr(os, name, self.counted(name, call))

    def counted(self, name, call):
        def wrapped(*args, **kwargs):
            if name != "open" or args[1] & (os.O_CREAT | os.O_APPEND):
                self.left -= 1
                if self.left < 0:
                    raise Killed
            return call(*args, **kwargs)

        return wrapped

    def __exit__(self, kind, *_):
        for name, call in self.calls.items():
            setattr(os, name, call)
        return kind is Killed


class Module(nn.Module):
    """A weight that says whose sample it is, and one that may be frozen; its value is that of ``body``."""

    def __init__(self, value, body=0, frozen=False):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), float(value)))
        self.body = nn.Parameter(torch.full((3,), float(body)), requires_grad=not frozen)


class Run:
    """A run: id, chain, last step, and checkpoints as (state of the bank, the chain's arrivals, step)."""

    def __init__(self, number, chain):
        self.id, self.number, self.chain, self.step, self.checkpoints = f"{number:016x}", number, chain, 0, []

    def value(self, step):
        return 1000 * self.number + step


def body_of(value):
    """Frozen weights of the sample with that value: some runs have others."""
    return value // 1000 % 3 // 2


class Promises(RuleBasedStateMachine):
    """``held``: (chain, step) -> value. ``arrivals``: chain -> steps offered. ``owners``: chain -> id of a run."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "bank"
        self.held, self.arrivals, self.owners, self.runs = {}, {}, {}, []
        self.bank, self.active, self.unfinished = None, None, {}

    @initialize(capacity=st.sampled_from([None, 1, 3]), base=st.sampled_from([None, "stored", "reference"]))
    def choose(self, capacity, base):
        self.options = {"capacity": capacity, "policy": "last", "exist_ok": True, "base": base or "stored"}
        self.frozen = base is not None
        SampleBank(self.path, **self.options).close()

    def module_of(self, value):
        return Module(value, body_of(value), self.frozen)

    # ------------------------------------------------------------------------------------------------ the model's rules

    def offered(self, chain, step, value):
        """``add`` may remove: the sample with the same chain and step; what the policy discards of the same chain."""
        steps = self.arrivals.setdefault(chain, [])
        if step not in steps:
            steps.append(step)
        self.held[chain, step] = value
        if self.options["capacity"] is not None:
            for old in steps[: -self.options["capacity"]]:
                self.held.pop((chain, old), None)

    def cut(self, chain, arrivals):
        """``resume`` and ``truncate`` may remove: samples of the run's own chains that the checkpoint does not know."""
        self.arrivals[chain] = list(arrivals)
        self.held = {key: v for key, v in self.held.items() if key[0] != chain or key[1] in arrivals}
        self.unfinished = {key: v for key, v in self.unfinished.items() if key[0] != chain or key[1] in arrivals}

    # ------------------------------------------------------------------------------------------------------------- runs

    def open(self):
        self.bank = SampleBank(self.path, **self.options)

    @precondition(lambda self: self.active is None and len(self.runs) < 5)
    @rule()
    def start(self):
        """Append: a further chain; removes nothing."""
        self.open()
        chain = max([*self.arrivals, *self.owners, -1]) + 1
        self.active = Run(len(self.runs) + 1, chain)
        self.runs.append(self.active)
        self.bank.claim(self.active.id, [chain])
        self.owners[chain] = self.active.id

    @precondition(lambda self: self.active is not None)
    @rule(gaps=st.lists(st.integers(1, 3), min_size=1, max_size=6))
    def add(self, gaps):
        run = self.active
        for gap in gaps:
            run.step += gap
            self.bank.add(self.module_of(run.value(run.step)), step=run.step, chain=run.chain)
            self.offered(run.chain, run.step, run.value(run.step))
            self.unfinished.pop((run.chain, run.step), None)

    @precondition(lambda self: self.active is not None)
    @rule()
    def checkpoint(self):
        run, state = self.active, json.loads(json.dumps(self.bank.state_dict()))
        run.checkpoints.append((state, list(self.arrivals.get(run.chain, [])), run.step))

    @precondition(lambda self: self.active is not None)
    @rule()
    def stop(self):
        self.bank.close()
        self.bank = self.active = None

    @precondition(lambda self: self.active is not None)
    @rule(at=st.integers(0, 18), compact=st.booleans())
    def kill(self, at, compact):
        """In the middle of an addition, or of writing the manifest anew: before or after, nothing in between."""
        run, before = self.active, (copy.deepcopy(self.held), copy.deepcopy(self.arrivals))
        step = run.step + 1
        with killed_at(at):
            if compact:
                self.bank.compact()
            else:
                self.bank.add(self.module_of(run.value(step)), step=step, chain=run.chain)
        self.bank.close()
        self.bank = self.active = None
        if compact:
            return
        self.offered(run.chain, step, run.value(step))
        if (run.chain, step) not in self.on_disk():
            self.held, self.arrivals = before
            self.unfinished[run.chain, step] = run.value(step)

    @precondition(lambda self: self.active is None and any(run.checkpoints for run in self.runs))
    @rule(data=st.data())
    def resume(self, data):
        run = data.draw(st.sampled_from([run for run in self.runs if run.checkpoints]))
        number = data.draw(st.integers(0, len(run.checkpoints) - 1))
        state, arrivals, step = run.checkpoints[number]
        run.checkpoints = run.checkpoints[: number + 1]
        self.open()
        self.bank.load_state_dict(state, chains=[run.chain])
        self.bank.claim(run.id, [run.chain])
        self.owners[run.chain] = run.id
        self.active, run.step = run, step
        self.cut(run.chain, arrivals)

    @precondition(lambda self: self.active is None and len(self.owners) > 1)
    @rule(data=st.data())
    def take_the_chain_of_another_run(self, data):
        """Refused, and nothing has changed."""
        taken = [chain for chain in self.owners if self.arrivals.get(chain)]
        if taken:
            with SampleBank(self.path, **self.options) as bank, pytest.raises(BankError, match="is that of run"):
                bank.claim("f" * 16, [data.draw(st.sampled_from(taken))])

    @precondition(lambda self: self.active is not None)
    @rule()
    def a_second_writer(self):
        with pytest.raises(BankError, match="another writer"):
            SampleBank(self.path, **self.options)
        with pytest.raises(BankError, match="another writer"):
            SampleBank.open(self.path).add(self.module_of(0), step=0)

    # ---------------------------------------------------------------------------------------------------------- sharing

    @rule(steps=st.sets(st.integers(1, 20), min_size=1, max_size=4))
    def merge(self, steps):
        """Takes the other bank's samples in under new labels; removes nothing."""
        if len(self.arrivals) > 8:
            return
        other, number = SampleBank(capacity=self.options["capacity"], policy="last"), 50 + len(self.arrivals)
        other.claim(f"{number:016x}", [0])
        for step in sorted(steps):
            other.add(self.module_of(1000 * number + step), step=step)
        chain = max([*self.arrivals, *self.owners, -1]) + 1
        bank = self.bank if self.bank is not None else SampleBank.open(self.path)
        bank.merge(other, chains="renumber")
        for info in other.infos:
            self.offered(chain, info.step, 1000 * number + info.step)
        self.owners[chain] = f"{number:016x}"
        if bank is not self.bank:
            bank.close()

    @precondition(lambda self: self.active is not None)
    @rule(back=st.integers(0, 4))
    def truncate(self, back):
        run = self.active
        run.step = max(run.step - back, 0)
        before = len(self.held)
        self.cut(run.chain, [step for step in self.arrivals.get(run.chain, []) if step <= run.step])
        assert self.bank.truncate(run.step, chains=[run.chain]) == before - len(self.held)
        run.checkpoints = [point for point in run.checkpoints if point[2] <= run.step]

    @precondition(lambda self: self.active is None and self.held)
    @rule(lose=st.sampled_from(["manifest", "journal", "nothing"]))
    def recover(self, lose):
        """Removes nothing, and takes in additions that a crash had cut short."""
        if lose == "manifest":
            (self.path / "manifest.json").unlink()
        if lose == "journal":
            for file in self.path.glob("journal-*"):
                file.unlink()
        SampleBank.recover(self.path)
        found = self.on_disk()
        assert self.held.items() <= found.items()
        assert found.items() <= {**self.unfinished, **self.held}.items()
        self.held, self.unfinished = found, {}
        if lose == "nothing":
            for chain, step in found:
                steps = self.arrivals.setdefault(chain, [])
                steps += [step] if step not in steps else []
            return
        self.arrivals = {chain: sorted(s for c, s in found if c == chain) for chain in {c for c, _ in found}}
        if lose == "manifest":
            self.owners = {}

    # ------------------------------------------------------------------------------------------------------ the promise

    def on_disk(self):
        bank = SampleBank.open(self.path)
        assert not bank.damaged
        if bank.needs_base:
            try:
                bank.give_base(Module(0, 0))
            except BankError:
                bank.give_base(Module(0, 1))
        held, module = {}, Module(-1, -1)
        for number, sample in enumerate(bank):
            bank.load_into(module, number)
            held[sample.chain, sample.step] = value = int(module.weight)
            assert (module.body == body_of(value)).all()
        return held

    @invariant()
    def the_directory_holds_what_the_model_says(self):
        if not self.path.exists():
            return
        assert self.on_disk() == self.held
        if self.bank is not None:
            assert {(info.chain, info.step) for info in self.bank.infos} == self.held.keys()
            assert self.bank.runs == self.owners

    def teardown(self):
        if self.bank is not None:
            self.bank.close()
        shutil.rmtree(self.folder)


def check(examples, steps):
    run_state_machine_as_test(
        Promises,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_a_bank_keeps_its_promises():
    check(*SHORT)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_bank_keeps_its_promises_over_thousands_of_steps():
    check(*LONG)
