"""Steps made while the backward pass runs, each as soon as its gradient is there, which is let go at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_lpsgld.ops.coded import CodedTensor
from lightning_lpsgld.samplers.grid import GridSampler

__all__ = ["CodedSampler", "first_rows"]

#: Values of a group that a step is made with: what is set after the first step of a backward pass comes too late.
_WATCHED = ("lr", "weight_decay", "temperature", "seed", "step")


def first_rows(x: Tensor, elements: int) -> Tensor:
    """The first rows of a tensor that hold about so many elements, at least one; a 0-d tensor itself."""
    return x[: max(1, elements * max(1, len(x)) // max(1, x.numel()))] if x.ndim else x


class CodedSampler(GridSampler):
    """A sampler that also moves weights held as codes (:class:`~lightning_lpsgld.ops.coded.CodedTensor`).

    Within ``step(closure)`` such a weight is moved during the closure's backward pass, as soon as its gradient is
    complete, and the gradient is let go. The step is the one that would have been made afterwards, with the same draws;
    but what looks at all gradients together has none to look at, and a bad gradient is found when others have moved.

    Attributes:
        steps_in_backward: Whether that is done; ``False`` leaves gradients until the closure has returned. ``None``:
            where there is one process; with several it has to be said, as gradients may have to be averaged first.
        gradient_transforms: Called with every gradient before its step in a backward pass, to change it in place.
        gradient_rows: First rows of the gradients of the last measured step whose weights moved in a backward pass, for
            those who ask when the gradients are gone.
    """

    takes_codes = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.steps_in_backward: bool | None = None
        self.gradient_transforms: list[Callable[[Tensor], Any]] = []
        self.gradient_rows: dict[Tensor, Tensor] = {}
        self._moved: dict[int, str] = {}
        self._settings_used: dict[int, tuple[Any, ...]] = {}
        super().__init__(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------- what is refused

    def check_parameters(self, group: Mapping[str, Any]) -> None:
        """As :meth:`LangevinOptimizer.check_parameters`.

        Raises:
            ValueError: Also for weights held as codes that the options do not go with.
        """
        super().check_parameters(group)
        for param in group["params"]:
            if isinstance(param, CodedTensor):
                self._check_coded(param)

    def _check_coded(self, param: CodedTensor) -> None:
        owner = f"{type(self).__name__}: a weight of shape {tuple(param.shape)} is held as codes of {param.format}"
        if param.format != self.weight_format or param in self.full_precision:
            given = "None, as it is in `full_precision`" if param in self.full_precision else self.weight_format
            raise ValueError(
                f"{owner}, so `weight_format` must be that format, got {given}. Give weight_format='{param.format}', "
                "or make it floats: lightning_lpsgld.ops.float_parameters_(module)."
            )
        if self.accumulator == "full":
            raise ValueError(
                f"{owner}, and accumulator='full' keeps a float sum beside each weight. Use accumulator='low', a "
                "format such as 'bfp16', or storage='float'."
            )
        if self.prior_mean != "zero":
            raise ValueError(
                f"{owner}, and prior_mean={self.prior_mean!r} keeps a float mean beside each weight. Use "
                "prior_mean='zero', or storage='float'."
            )

    # ------------------------------------------------------------------------------------------------------- stepping

    @contextmanager
    def _around_closure(self) -> Iterator[None]:
        """Within this, weights held as codes are moved in backward passes.

        Raises:
            RuntimeError: If several backward passes reach a weight, or a setting changes after a step was made with it.
        """
        groups = {p: g for g in self.sampled_groups for p in g["params"] if isinstance(p, CodedTensor)}
        if not groups or not self._in_backward():
            yield
            return
        with ExitStack() as stack:
            for param, group in groups.items():
                if param.requires_grad:
                    handle = param.register_post_accumulate_grad_hook(lambda p, g=group: self._move(g, p))
                    stack.callback(handle.remove)
            try:
                yield
                self._refuse_late_settings()
            except BaseException as error:
                self._say_half_made(error)
                raise

    def _in_backward(self) -> bool:
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.steps_in_backward is None and ranks > 1:
            raise RuntimeError(
                f"{type(self).__name__} does not know whether gradients are averaged over the {ranks} processes after "
                "each backward pass, and so when to move weights held as codes. Set `sampler.steps_in_backward` to "
                "False (DDP), or to True (independent processes)."
            )
        return self.steps_in_backward is not False

    def _move(self, group: dict[str, Any], param: Tensor) -> None:
        """The step of one weight, whose gradient is complete."""
        if id(param) in self._moved:
            raise RuntimeError(
                f"{type(self).__name__}: a second backward pass within one step reaches {self.name_of(param)}, which "
                "has moved already, as it is held as codes. Add the losses and call backward once (activation "
                "checkpointing: use_reentrant=False), or use storage='float'."
            )
        used = self._settings_of(group)
        if self._settings_used.setdefault(id(group), used) != used:
            self._refuse_late_settings()
        params, grads = self._with_gradients({**group, "params": [param]})
        for transform in self.gradient_transforms:
            transform(grads[0])
        if self.check_finite:
            super()._refuse_non_finite(None, [(group, params, grads)])
        self._moved[id(param)] = self.name_of(param)
        if self._measure_next is not None:
            self.gradient_rows[param] = first_rows(grads[0], self._measure_next).clone()
        self._step_of(group, params, grads)
        param.grad = None

    @staticmethod
    def _settings_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(float(group[name]) for name in _WATCHED)

    def _refuse_late_settings(self) -> None:
        for number, group in enumerate(self.sampled_groups):
            used = self._settings_used.get(id(group), self._settings_of(group))
            for name, before, now in zip(_WATCHED, used, self._settings_of(group)):
                if before != now:
                    raise RuntimeError(
                        f"{type(self).__name__}: `{name}` of parameter group {number} was set to {now} after weights "
                        f"held as codes had moved with {before} in the backward pass of the same step. Set it before "
                        "backward or after the step, or use storage='float'."
                    )

    def _say_half_made(self, error: BaseException) -> None:
        if self._moved:
            reason = f"{error}".split(" The step was refused")[0]
            self._finite.stand(
                f"Step {self.steps} was broken off after {len(self._moved)} weights held as codes had moved "
                f"({type(error).__name__}: {reason}): the weights are between two states. No state, checkpoint or "
                "sample is given out. Go back to the last checkpoint."
            )

    def _refuse_non_finite(self, loss: Any, work: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        try:
            super()._refuse_non_finite(loss, work)
        except FloatingPointError as error:
            self._say_half_made(error)
            raise

    def step(self, closure: Any = None) -> Any:
        """See :meth:`LangevinOptimizer.step`."""
        self._moved, self._settings_used = {}, {}
        loss = super().step(closure)
        if self._moved:
            place = {self.name_of(param): i for i, param in enumerate(self._indices)}
            self.measured.sort(key=lambda found: place[found.name])
            self.saturated.sort(key=lambda counted: self.index_of(counted[0][0]))
        return loss

    def _place(self, params: Sequence[Tensor]) -> None:
        coded = [param for param in params if isinstance(param, CodedTensor)]  # these lie on it
        super()._place([param for param in params if not isinstance(param, CodedTensor)])
        for param in coded:
            if param.requires_grad:
                self.accumulator_of(param)
            param.cell.finer = None

    def _look(self, group: dict[str, Any], params: list[Tensor]) -> Tensor:
        counts = super()._look(group, params)
        # A sum that was loaded from a run with another grid is floats until now.
        self._hold_sums(param for param in params if isinstance(param, CodedTensor))
        return counts
