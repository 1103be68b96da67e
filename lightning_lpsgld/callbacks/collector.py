"""Gathers posterior samples while a model trains."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_lpsgld.arguments import require_count
from lightning_lpsgld.bank import BankError, BaseKind, SampleBank, constant_names, module_tensors
from lightning_lpsgld.callbacks.chains import add_sample, begin_new_chain, chain_count, settle_samplers
from lightning_lpsgld.callbacks.ranks import raise_everywhere
from lightning_lpsgld.callbacks.run_facts import (
    cycles_of,
    formats_of,
    full_tensors,
    optimizer_of,
    start_in_steps,
    total_steps_of,
)
from lightning_lpsgld.callbacks.schedule import CollectionSchedule, check_start
from lightning_lpsgld.samplers import CyclicalStepSize, LangevinOptimizer

__all__ = ["SampleCollector"]


class SampleCollector(Callback):
    r"""Collect posterior samples during ``trainer.fit`` into a :class:`~lightning_lpsgld.bank.SampleBank`.

    A sample is taken after an optimizer step, never twice for one (gradient accumulation), and before checkpoints of
    the same step are written. Parameters on a grid are stored as codes and exponents; with ``accumulator="full"`` a
    sample is the rounded view that the forward pass sees. Any other optimizer is collected from as it is.

    Every run has an id, drawn when it starts, kept in its checkpoints and in the bank. Resuming with
    ``fit(ckpt_path=...)`` cuts the run's own chains back to the checkpoint, so that they become those of an
    uninterrupted run; it says how many samples it drops, and which ones are missing. Samples of other runs are never
    touched, and a bank in which the chain is another run's is refused. The bank is locked from the start of the fit to
    its end, so that two runs on one path are refused at once. A further ``fit`` with the same trainer and callback
    continues the bank. ``fast_dev_run`` collects into memory and leaves ``path`` alone.

    Args:
        path: Directory or fsspec address of the bank, written by rank zero; every rank must be able to read it.
            ``None``: in memory, on every rank, and inside every checkpoint.
        start: Burn-in b: an int >= 0 in optimizer steps, or a float in [0, 1) as a fraction of the run.
        every: Thinning n in optimizer steps, or ``"epoch"``: at the end of each training epoch. The first sample is
            taken n steps after the burn-in.
        per_cycle: Keep only the last k samples of each cycle, n steps apart, the last one at the end of the cycle.
        cycle_length: Steps of a cycle; by default that of the sampler's :class:`CyclicalStepSize`.
        capacity: Most samples kept; ``None``: all.
        policy: What a full bank does, see :class:`~lightning_lpsgld.bank.SampleBank`.
        chain: Label of the chain. Two collectors in one trainer need different ones. Of parallel chains, that of the
            first; the others follow.
        base: Frozen parameters stand in the bank once (``"stored"``), or only their checksums do (``"reference"``), and
            the module has to have them again when samples are loaded; see :class:`~lightning_lpsgld.bank.SampleBank`.
        append: Add to samples that are at ``path`` already, as a new chain if the label is taken.

    Raises:
        ValueError: If an argument is out of range; when training starts, if it is certain that no step of the run will
            give a sample, or a fraction or a cycle length cannot be resolved.
        BankError: On every rank. When training starts, if samples of another run are at ``path`` and ``append`` is not
            set, another run is writing there, or the bank is not that of the checkpoint. When a sample is taken, if it
            is refused (it is not finite), or the bank was deleted, moved or changed by others.

    Warns:
        If a run ends without a sample.

    Example:
        >>> SampleCollector(start=0.5, every=10).schedule is None  # resolved when training starts
        True
        >>> SampleCollector(start=1.5)
        Traceback (most recent call last):
        ValueError: SampleCollector: `start` must be an int >= 0 (steps) or a float in [0, 1) (of the run), got 1.5.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        start: int | float = 0,
        every: int | Literal["epoch"] = 1,
        per_cycle: int | None = None,
        cycle_length: int | None = None,
        capacity: int | None = None,
        policy: Literal["thin", "reservoir", "last"] = "thin",
        chain: int = 0,
        base: BaseKind = "stored",
        append: bool = False,
    ) -> None:
        check_start(start)
        if isinstance(every, bool) or (every != "epoch" and (not isinstance(every, int) or every < 1)):
            raise ValueError(f"SampleCollector: `every` must be an int >= 1 (steps) or 'epoch', got {every!r}.")
        for name, value in (("per_cycle", per_cycle), ("cycle_length", cycle_length)):
            if value is not None:
                require_count(name, value, owner="SampleCollector")
        require_count("chain", chain, low=0, owner="SampleCollector")
        if cycle_length is not None and per_cycle is None:
            raise ValueError("SampleCollector: `cycle_length` has no effect without `per_cycle`.")
        SampleBank(capacity=capacity, policy=policy, base=base)  # refuses bad values now, not after hours of burn-in
        self.path = None if path is None else os.fspath(path)
        self.start = start
        self.every = every
        self.per_cycle = per_cycle
        self.cycle_length = cycle_length
        self.capacity = capacity
        self.policy = policy
        self.chain = chain
        self.base: BaseKind = base
        self.append = append
        self._stage: str | None = None
        self._pending: dict[str, Any] | None = None
        self._writes = True
        self._forget()

    def _forget(self) -> None:
        """Become as new: no bank, nothing seen."""
        self._bank: SampleBank | None = None
        self.schedule: CollectionSchedule | None = None
        self.collected = 0
        self.run: str | None = None  #: Id of the run, 16 hexadecimal digits; ``None`` before training starts.
        self._label = self.chain
        self._burn_in: int | None = None
        self._seen: int | None = None
        self._lr: float | None = None
        self._dry = False

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; it does not change when the bank's directory is moved."""
        return self._generate_state_key(chain=self.chain)

    @property
    def bank(self) -> SampleBank:
        """The samples so far. On ranks that do not write, and before any fit, ``path`` is opened to be read.

        Raises:
            BankError: If there is nothing at ``path`` yet.
        """
        if self._bank is None and self.path is None:
            self._bank = self._open()
        return SampleBank.open(str(self.path), verify=False) if self._bank is None else self._bank

    # ------------------------------------------------------------------------------------------------------ the run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember what the trainer is about to do: only a fit may cut the bank back."""
        self._stage = stage

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open or cut back the bank; refuse a run that cannot give a sample."""
        dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if dry or self._dry:
            self._forget()
            self._dry = dry
        self._writes = trainer.is_global_zero or self.path is None or dry
        pending, self._pending = self._pending, None
        problem: Exception | None = None
        try:
            if pending is None:
                self._start_anew(trainer)
            else:
                self._restore(pending, chain_count(trainer))
        except (BankError, OSError) as error:
            problem = error
            self._close()
            self._bank = None
        raise_everywhere(problem)  # a rank that went on alone would wait for the others for ever
        self._label, self.run = trainer.strategy.broadcast((self._label, self.run))
        if getattr(trainer.precision_plugin, "begins_new_chain", False):
            self._label = begin_new_chain(self._bank, trainer, self._label, self.run)
        self.schedule = CollectionSchedule() if dry else self._resolve_schedule(trainer)
        self._refuse_hopeless(trainer)
        self._warn_if_lost(trainer)
        self._advance(trainer, pl_module)  # a checkpoint may have been written between the step and our hook

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step size before schedulers change it."""
        optimizer = optimizer_of(trainer)
        group = optimizer.param_groups[0]
        lr = optimizer.step_size(group) if isinstance(optimizer, LangevinOptimizer) else group.get("lr")
        self._lr = None if lr is None else float(lr)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a sample if the step just made is due."""
        self._advance(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a sample with ``every="epoch"``."""
        step = trainer.global_step
        if self._by_epoch and self.schedule is not None and self.schedule.due(step):
            self._collect(trainer, pl_module, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if there is no sample."""
        if self.collected:
            return
        rank_zero_warn(
            f"SampleCollector collected no sample: the run ended after {trainer.global_step} optimizer steps, with "
            f"start={self._burn_in} and {self._description()}. Lower `start` or `every`, or train longer."
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let others write the bank."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let others write the bank."""
        self._close()

    def _close(self) -> None:
        if self._bank is not None:
            self._bank.close()

    @property
    def _by_epoch(self) -> bool:
        return self.every == "epoch" and not self._dry

    def _description(self) -> str:
        cycles = self.schedule is not None and self.per_cycle is not None
        of = f", per_cycle={self.per_cycle} of {self.schedule.cycle_length} steps" if self.schedule and cycles else ""
        return f"every={self.every!r}{of}"

    def _advance(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, seen = trainer.global_step, self._seen
        self._seen = step
        if seen is None or step <= seen or self._by_epoch:
            return
        assert self.schedule is not None
        if self.schedule.due_within(seen + 1, step):
            self._collect(trainer, pl_module, step)

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        assert self.schedule is not None
        settle_samplers(trainer)
        optimizer = optimizer_of(trainer)
        temperature = optimizer.param_groups[0]["temperature"] if isinstance(optimizer, LangevinOptimizer) else None
        tensors = full_tensors(module_tensors(pl_module))  # a sharded module is gathered on all ranks
        problem: Exception | None = None
        try:
            add_sample(
                self._bank if self._writes else None,
                trainer,
                tensors,
                chain=self._label,
                to_all=self.path is None or self._dry,
                step=step,
                cycle=self.schedule.cycle(step),
                temperature=None if temperature is None else float(temperature),
                lr=self._lr,
                formats=formats_of(trainer, pl_module, self._bank),
                constant=constant_names(pl_module),
            )
        except (BankError, OSError) as error:
            problem = error
        raise_everywhere(problem)
        self.collected += 1

    # ----------------------------------------------------------------------------------------------------- starting

    def _start_anew(self, trainer: pl.Trainer) -> None:
        if self._seen is not None and trainer.global_step < self._seen:
            raise BankError(
                f"SampleCollector has seen {self._seen} steps of another run, and this one starts at step "
                f"{trainer.global_step}. Use a new SampleCollector for a new run, or resume with `ckpt_path`."
            )
        new = self._bank is None
        if new or self.run is None:
            self.run = secrets.token_hex(8)
        self._seen = trainer.global_step
        if not self._writes:
            return
        if self._bank is None:
            self._bank = self._open()
            self._refuse_foreign_samples(chain_count(trainer))
        self._bank.claim(self.run, self._chains(chain_count(trainer)))

    def _chains(self, count: int) -> range:
        """Labels of the chains that this run writes."""
        return range(self._label, self._label + count)

    def _open(self) -> SampleBank:
        path = None if self._dry else self.path
        return SampleBank(path, capacity=self.capacity, policy=self.policy, base=self.base, exist_ok=True)

    def _refuse_foreign_samples(self, chains: int) -> None:
        bank = self._bank
        assert bank is not None
        taken = {*bank.chains, *(damage.info.chain for damage in bank.damaged)}
        if not taken:
            return
        if not self.append:
            raise BankError(
                f"{self.path} already holds {len(bank)} samples (last step {max(bank.steps, default=0)}), and this "
                "fit starts a new run. Resume that run with `fit(ckpt_path=...)`, give SampleCollector another path, "
                "or add to it as a further chain with `append=True`."
            )
        if taken.intersection(self._chains(chains)):
            self._label = max(taken) + 1
            rank_zero_info(f"SampleCollector appends to {self.path} as chain {self._label}.")

    def _restore(self, state: Mapping[str, Any], chains: int) -> None:
        self._seen, self.collected = state["seen"], state["collected"]
        self._label, self._lr = state["chain"], state["lr"]
        asked, resolved = state["start"]
        self._burn_in = resolved if asked == self.start else None  # a fraction keeps its meaning if the run is extended
        self.run = state.get("run") or secrets.token_hex(8)  # checkpoints of the first releases have none
        if not self._writes:
            return
        if self.path is not None or self._bank is None:
            self._close()
            self._bank = self._open()
        if state.get("run") and self.path is not None:
            self._refuse_other_bank(self._bank, self.run)
        if state["bank"] is not None:
            self._bank.load_state_dict(state["bank"], chains=self._chains(chains))
        self._bank.claim(self.run, self._chains(chains))

    def _refuse_other_bank(self, bank: SampleBank, run: str) -> None:
        others = sorted(set(bank.runs.values()))
        if len(bank) and others and run not in others:
            raise BankError(
                f"The checkpoint is one of run {run}, and the {len(bank)} samples at {bank.path} are those of "
                f"run {' and run '.join(others)}: they are not mixed. Give the path of this run's bank, "
                "or an empty one."
            )

    def _resolve_schedule(self, trainer: pl.Trainer) -> CollectionSchedule:
        if self._burn_in is None:
            self._burn_in = start_in_steps(self.start, trainer)
        if self.per_cycle is None:
            found = cycles_of(trainer)
            length = None if found is None else found.cycle_length
            return CollectionSchedule(self._burn_in, self.every, cycle_length=length, cycles=found)
        batches = trainer.num_training_batches
        epoch = math.ceil(batches / trainer.accumulate_grad_batches) if batches != math.inf else None
        cycles = self._resolve_cycles(trainer)
        return CollectionSchedule(self._burn_in, self.every, self.per_cycle, cycles.cycle_length, epoch, cycles)

    def _resolve_cycles(self, trainer: pl.Trainer) -> CyclicalStepSize:
        found = cycles_of(trainer)
        if self.cycle_length is not None and found is not None and found.cycle_length != self.cycle_length:
            raise ValueError(
                f"SampleCollector: `cycle_length` is {self.cycle_length}, but the sampler's cycles have "
                f"{found.cycle_length} steps. Leave `cycle_length` out."
            )
        if found is None and self.cycle_length is not None:
            found = CyclicalStepSize(self.cycle_length)
        if found is None:
            raise ValueError(
                f"SampleCollector: per_cycle={self.per_cycle} needs the length of a cycle, and the sampler has no "
                "CyclicalStepSize. Use LowPrecisionSGLD(cycles=...), or pass `cycle_length`."
            )
        return found

    def _refuse_hopeless(self, trainer: pl.Trainer) -> None:
        assert self.schedule is not None
        total = total_steps_of(trainer)
        if not self.collected and not self._dry and self.schedule.hopeless(trainer.global_step, total):
            raise ValueError(
                f"SampleCollector will not collect a single sample: the run has {total:g} optimizer steps, with "
                f"start={self.schedule.start} and {self._description()}. Lower `start` or `every`, or train longer."
            )

    def _warn_if_lost(self, trainer: pl.Trainer) -> None:
        if self.path is None and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            rank_zero_warn(
                "SampleCollector() keeps samples in the memory of processes that end with `fit`, because the strategy "
                "spawns or forks them. Pass a path, or use strategy='ddp'."
            )

    # -------------------------------------------------------------------------------------------------- saved state

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides about the next sample; of a bank in memory also the samples."""
        return {
            "seen": self._seen,
            "collected": self.collected,
            "start": (self.start, self._burn_in),
            "chain": self._label,
            "lr": self._lr,
            "run": self.run,
            "bank": None if self._bank is None or self._dry else self._bank.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume, if a fit is about to start; otherwise take samples from the checkpoint only if there are none."""
        if self._stage == "fit":
            self._pending = state_dict
        elif self.path is None and state_dict["bank"] is not None and not len(self.bank):
            self.bank.load_state_dict(state_dict["bank"])
