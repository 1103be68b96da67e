"""Settings that differ between a checkpoint and the fit that resumes it, and what is done about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_lpsgld.samplers import LangevinOptimizer
from lightning_lpsgld.samplers.step_size import schedule_from_settings

__all__ = ["ON_CHANGE", "Change", "ChangedSettingsError", "OnChange", "changes_between", "listed", "settle_changes"]

#: What happens if a fit resumes a checkpoint of a run that had other settings.
OnChange = Literal["refuse", "checkpoint", "new"]
#: The values of :data:`OnChange`.
ON_CHANGE: tuple[OnChange, ...] = ("refuse", "checkpoint", "new")

#: Settings that a built run can take over from a checkpoint, beside those that stand in parameter groups.
_TAKEN_OVER = ("seed", "num_data", "schedule")


class ChangedSettingsError(ValueError):
    """A fit would resume a checkpoint with settings that make another chain."""


@dataclass(frozen=True)
class Change:
    """A setting that differs.

    Attributes:
        name: As the user writes it.
        saved: Value in the checkpoint.
        now: Value asked for.
    """

    name: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {_show(self.saved)} in the checkpoint, {_show(self.now)} now"


def _show(value: Any) -> str:
    if isinstance(value, Mapping):  # a schedule
        fields = ", ".join(f"{k}={v!r}" for k, v in value.items() if k != "kind")
        return f"{value['kind']}({fields})"
    if isinstance(value, tuple) and len(value) > 6:
        return f"({', '.join(map(repr, value[:6]))}, ... {len(value)} in all)"
    return repr(value)


def changes_between(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs, in the order of ``now``; of names that only one of them has nothing is known."""
    return [Change(name, saved[name], now[name]) for name in now if name in saved and saved[name] != now[name]]


def settle_changes(
    changes: Sequence[Change],
    policy: OnChange,
    samplers: Sequence[LangevinOptimizer],
    saved: Mapping[str, Any],
    *,
    scheduled: bool,
) -> None:
    """Do what the user wants done about settings that differ; before the samplers' states are restored.

    Args:
        changes: What differs; at least one.
        policy: ``"refuse"``, ``"checkpoint"`` or ``"new"``.
        samplers: Those of the run that is about to begin.
        saved: Settings in the checkpoint.
        scheduled: Whether there are LR schedulers, whose state is the checkpoint's in any case.

    Raises:
        ChangedSettingsError: As the policy is, or if it cannot be carried out; all differences are named.
    """
    if policy == "refuse":
        raise ChangedSettingsError(
            f"This fit would resume a chain with other settings than it had: {listed(changes)}. Set them back; or say "
            "what is meant: LowPrecisionSGLD(on_change='checkpoint') goes on with the checkpoint's, "
            "on_change='new' begins a new chain at the checkpoint's weights."
        )
    if policy == "checkpoint":
        _take_over(changes, samplers, saved)
    else:
        _begin_anew(changes, samplers, scheduled)


def _take_over(changes: Sequence[Change], samplers: Sequence[LangevinOptimizer], saved: Mapping[str, Any]) -> None:
    in_groups = {name for sampler in samplers for name in sampler.group_options}
    plain = [change.name.partition(" of optimizer ")[0] for change in changes]
    built = [c for c, name in zip(changes, plain) if name not in in_groups and name not in _TAKEN_OVER]
    unknown = [c for c in changes if "schedule" in c.name and schedule_from_settings(c.saved) is None]
    if built or unknown:
        raise ChangedSettingsError(
            f"on_change='checkpoint' cannot change what the run was built with: {listed([*built, *unknown])}. Build it "
            "as the checkpoint's was, or begin a new chain with on_change='new'."
        )
    for number, sampler in enumerate(samplers):
        where = "" if number == 0 else f" of optimizer {number}"
        sampler.num_data = saved.get("num_data" + where, sampler.num_data)
        schedule = schedule_from_settings(saved.get("schedule" + where))
        sampler.schedule = sampler.schedule if schedule is None else schedule


def _begin_anew(changes: Sequence[Change], samplers: Sequence[LangevinOptimizer], scheduled: bool) -> None:
    rates = [change for change in changes if change.name.partition(" of optimizer ")[0] == "lr"]
    if rates and scheduled:
        raise ChangedSettingsError(
            f"on_change='new' cannot change the learning rate of a run with LR schedulers ({listed(rates)}): their "
            "state comes from the checkpoint, with its rates. Start a new fit from the checkpoint's weights: "
            "`module.load_state_dict(torch.load(path)['state_dict'])`, without `ckpt_path`."
        )
    for sampler in samplers:
        sampler.begin_anew(keep_lr=not rates)


def listed(changes: Sequence[Change]) -> str:
    """All changes in one line."""
    return "; ".join(map(str, changes))
