"""After a resume the chain is the checkpoint's: what is asked for now is compared with what it ran with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_lpsgld.precision.changes import Change, OnChange, changes_between, listed, settle_changes
from lightning_lpsgld.precision.prior import Prior
from lightning_lpsgld.precision.run import RunDescription
from lightning_lpsgld.samplers import LangevinOptimizer

__all__ = ["Resume", "run_settings", "settings_of"]

#: Settings that change the last bits of a chain but not its law: a difference is said, and refused by no policy.
_NUMERICS = ("arithmetic", "backend")


def settings_of(samplers: Sequence[LangevinOptimizer], run: Mapping[str, Any]) -> dict[str, Any]:
    """All that makes a chain what it is, as plain values by name; what a checkpoint remembers.

    Args:
        samplers: Those of a run that is about to begin: their learning rates are what the module configured, before any
            scheduler.
        run: Further settings, that no sampler has.

    Returns:
        Values by name; those of a further optimizer have its number in their name.
    """
    found = dict(run)
    for number, sampler in enumerate(samplers):
        where = "" if number == 0 else f" of optimizer {number}"
        found.update({name + where: value for name, value in sampler.settings().items()})
    return found


def run_settings(run: RunDescription, plugin: Any) -> dict[str, Any]:
    """What makes a chain what it is and no sampler has, as plain values by name.

    Args:
        run: The run.
        plugin: Its arguments ``sites``, ``prior_mean``, ``compute``, ``compress_gradients``, ``loss_scale``,
            ``arithmetic`` and ``backend``.
    """
    sites = None if plugin.sites is None else tuple(s if isinstance(s, str) else s.__qualname__ for s in plugin.sites)
    return {
        **{role: None if run.formats[role] is None else str(run.formats[role]) for role in ("activations", "errors")},
        "sites": sites,
        "sampled": run.parts.sampled,
        "prior_centre": Prior(plugin.prior_mean).centre,
        "exempt": run.parts.exempt,
        "compute": plugin.compute,
        "compress_gradients": plugin.compress_gradients,
        "loss_scale": float(plugin.loss_scale or 1.0),
        "arithmetic": plugin.arithmetic,
        "backend": str(plugin.backend),
        "seed": run.seed,
    }


def settings_of_old(checkpoint: Mapping[str, Any], card: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint tells that was saved before settings were: its optimizers' groups, and its card.

    Args:
        checkpoint: The checkpoint.
        card: The posterior card in it, if there was one.
    """
    found: dict[str, Any] = {}
    for number, state in enumerate(checkpoint.get("optimizer_states", ())):
        where = "" if number == 0 else f" of optimizer {number}"
        groups = state.get("param_groups", [])
        for name in ("temperature", "weight_decay", "friction", "inverse_mass", "beta", "eps", "mu"):
            if groups and all(name in group for group in groups):
                found[name + where] = _common([group[name] for group in groups])
    if card is not None:
        found["num_data"] = card["num_data"]
        found["algorithm"] = card["sampler"]
        if "offsets" not in card["formats"]:
            found.update({role: card["formats"].get(role) for role in ("weights", "gradients")})
        found.update({role: card["formats"].get(role) for role in ("activations", "errors")})
    return found


def _common(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else tuple(values)


class Resume:
    """What one plugin remembers of the settings of its fit, from ``connect`` to ``teardown``.

    A fit's settings are noted when its samplers are made. If a checkpoint is then restored, they are compared with the
    checkpoint's before any sampler's state is loaded.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] | None = None
        self.new_chain = False
        self._samplers: Sequence[LangevinOptimizer] = ()
        self._scheduled = False
        self._old: dict[str, Any] = {}
        self._fitting = False

    def begin(self, samplers: Sequence[LangevinOptimizer], run: Mapping[str, Any], *, scheduled: bool) -> None:
        """A fit was set up; see :func:`settings_of` and :func:`settle_changes`."""
        self.settings = settings_of(samplers, run)
        self._samplers, self._scheduled = samplers, scheduled
        self.new_chain, self._fitting = False, True

    def saved(self) -> dict[str, Any]:
        """What a checkpoint remembers: the settings, and the names of the parameters that are trained by now."""
        return {"settings": self.settings, "trainable": [name for name, param in self._held() if param.requires_grad]}

    def _held(self) -> list[tuple[str, Tensor]]:
        groups = [(sampler, group) for sampler in self._samplers for group in sampler.param_groups]
        return [(sampler.name_of(param), param) for sampler, group in groups for param in group["params"]]

    def end(self) -> None:
        """The fit ended."""
        self._fitting = False

    def when_restored(self, call: Callable[[], Any]) -> None:
        """Call back once the states of all samplers were loaded."""
        waiting = set(range(len(self._samplers)))

        def note(number: int) -> None:
            waiting.discard(number)
            if not waiting:
                call()

        for number, sampler in enumerate(self._samplers):
            sampler.state_observers = [partial(note, number)]

    def note_old(self, checkpoint: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """What a checkpoint without settings tells all the same."""
        self._old = {} if state is None or "settings" in state else settings_of_old(checkpoint, state.get("card"))

    def compare(self, state: Mapping[str, Any], policy: OnChange, *, seed_asked: bool) -> None:
        """Compare the settings of the fit with those of the checkpoint that it resumes, and do as the policy is.

        Args:
            state: The plugin's state in the checkpoint.
            policy: What to do about differences.
            seed_asked: Whether the user gave a seed; one that was drawn is no difference.

        Raises:
            ChangedSettingsError: See :func:`settle_changes`.
        """
        if not self._fitting or self.settings is None:
            return
        saved = {**(state.get("settings") or self._old)}
        if state.get("seed") is not None:
            saved["seed"] = state["seed"]
        now = {**self.settings, "algorithm": self._samplers[0].description}
        if not seed_asked:
            del now["seed"]
        found = changes_between(saved, now)
        self._say_numerics([change for change in found if change.name in _NUMERICS])
        changes = [change for change in found if change.name not in _NUMERICS]
        if changes:
            settle_changes(changes, policy, self._samplers, saved, scheduled=self._scheduled)
            self.new_chain = policy == "new"
            self._say(changes, policy)
        if not self.new_chain:
            kept = [name for name in self.settings if name in saved and name not in _NUMERICS]
            self.settings.update({name: saved[name] for name in kept})
            self._thaw(set(state.get("trainable", ())))

    def _thaw(self, names: set[str]) -> None:
        """Parameters that had joined the run are trained again; who unfroze them may not do it a second time."""
        thawed = [(name, param) for name, param in self._held() if name in names and not param.requires_grad]
        for _, param in thawed:
            param.requires_grad_(True)
        if thawed:
            rank_zero_info(
                f"LowPrecisionSGLD: {len(thawed)} parameter(s), {thawed[0][0]} among them, were trained when the "
                "checkpoint was made, and are unfrozen again."
            )

    @staticmethod
    def _say_numerics(changes: Sequence[Change]) -> None:
        if changes:
            rank_zero_warn(
                f"LowPrecisionSGLD: the resumed fit computes otherwise than the checkpoint's ({listed(changes)}). It "
                "samples the same posterior by the same steps, but sums are rounded elsewhere: its weights will not be "
                "those of an uninterrupted run bit for bit. Set it back for that."
            )

    @staticmethod
    def _say(changes: Sequence[Change], policy: OnChange) -> None:
        what = "goes on with those of the checkpoint" if policy == "checkpoint" else "begins a new chain at its weights"
        rank_zero_warn(f"LowPrecisionSGLD(on_change={policy!r}): settings differ ({listed(changes)}); the fit {what}.")
