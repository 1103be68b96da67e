"""A bank of samples as one module: a batch in, mean and uncertainties out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lpsgld.arithmetic import Arithmetic
from lightning_lpsgld.bank import BankError, SampleBank, module_tensors
from lightning_lpsgld.predictive.batches import default_logits, default_targets, device_of, to_device, with_targets
from lightning_lpsgld.predictive.conformal import (
    SetScore,
    class_scores,
    conformal_quantile,
    interval_scores,
    prediction_sets,
)
from lightning_lpsgld.predictive.members import (
    Called,
    check_how,
    evaluation_mode,
    refreshed_statistics,
    stack,
    stacked_outputs,
    streamed_outputs,
)
from lightning_lpsgld.predictive.prediction import ClassPrediction, Prediction, RegressionPrediction
from lightning_lpsgld.predictive.reading import TaskName, named_task
from lightning_lpsgld.predictive.reduction import open_output, reduce_outputs, task_of
from lightning_lpsgld.predictive.swap import swapped_weights
from lightning_lpsgld.predictive.tasks import Multilabel, Task, check_labels, class_indices

__all__ = ["PosteriorEnsemble"]


class PosteriorEnsemble(nn.Module):
    r"""The posterior predictive of a bank as an ``nn.Module``.

    .. math::
        \bar p(y \mid x) = \frac1K \sum_{s=1}^K p(y \mid x, \theta_s)

    Called with a batch it returns a :class:`.ClassPrediction` or :class:`.RegressionPrediction`. The module's own
    weights are neither used nor changed; members always run in evaluation mode. Sums are taken in float64, results have
    the dtype of the module's output (at least float32).

    Members are *streamed* (codes of all samples in memory, a quarter of float32; one decoded at a time) or *stacked*
    (float32 values of all, computed together by ``torch.func.vmap``). ``"auto"`` stacks what fits ``memory_limit``
    and goes back to streaming where a module cannot be vectorized; :attr:`how` says which it was.

    **Where the promise stops.** Activations are not rounded as in training, unless something casts them (the plugin in
    a Trainer, or your own casting): then members are streamed, and their layers multiply 8-bit codes where that pays.
    Coverage holds for points exchangeable with the held-out ones, on average, not for every class.

    Args:
        module: Built like the one that was sampled. It becomes a submodule, so ``.to(device)`` moves everything.
        bank: The samples, at least one.
        task: ``"multiclass"`` (logits ``(n, classes, ...)``), ``"binary"`` (one logit a point), ``"multilabel"``
            (logits ``(n, labels)``), ``"regression"`` (values, or a pair of mean and variance), a task with arguments
            such as :class:`.Multiclass` for classes in the last dim, or ``"auto"``: what has a variance is a
            regression, ``(n, 2 or more, ...)`` is multiclass, anything else has to be said.
        forward: ``forward(module, batch)`` gives the output; by default ``module(inputs)`` of the first element of a
            tuple, a mapping's usual key, or the batch itself. Outputs are read as :func:`.read_output` does.
        noise_std: Standard deviation of the targets around the mean, for a regression that gives no variance.
        members: ``"auto"``, ``"stacked"`` or ``"streamed"``.
        memory_limit: Most bytes of stacked float values under ``"auto"``.
        chunk: Members computed at once when stacked; activations take so many times the memory.
        arithmetic: Of streamed members where an :class:`~lightning_lpsgld.casting.ActivationCasting` is on the module
            (the plugin's in a Trainer, or your own): see :func:`.layer_arithmetic`.

    Raises:
        ValueError: If the bank is empty or an argument is out of range.
        BankError: If the module is not the one that was sampled.

    Example:
        >>> import torch
        >>> from lightning_lpsgld.bank import SampleBank
        >>> module, bank = torch.nn.Linear(2, 3), SampleBank()
        >>> for step in range(2):
        ...     _ = torch.nn.init.normal_(module.weight)
        ...     _ = bank.add(module, step=step)
        >>> prediction = PosteriorEnsemble(module, bank)(torch.ones(4, 2))
        >>> prediction.mean.shape, prediction.mutual_information.shape
        (torch.Size([4, 3]), torch.Size([4]))
    """

    def __init__(
        self,
        module: nn.Module,
        bank: SampleBank,
        *,
        task: TaskName | Task = "auto",
        forward: Callable[[nn.Module, Any], Any] = default_logits,
        noise_std: float | None = None,
        members: Literal["auto", "stacked", "streamed"] = "auto",
        memory_limit: int = 2**30,
        chunk: int = 16,
        arithmetic: Arithmetic = "auto",
    ) -> None:
        super().__init__()
        check_how(members, memory_limit, chunk, arithmetic)
        if noise_std is not None and not 0.0 <= noise_std < float("inf"):
            raise ValueError(f"PosteriorEnsemble: `noise_std` must be finite and >= 0, got {noise_std}.")
        if not len(bank):
            raise ValueError(f"PosteriorEnsemble: {bank!r} has no usable sample; collect some first.")
        if bank.needs_base:
            bank.give_base(module)
        self.called = Called(getattr(module, "_orig_mod", module), forward)
        self.bank, self.task, self.chunk, self.arithmetic = bank, named_task(task), chunk, arithmetic
        self.noise_variance = None if noise_std is None else float(noise_std) ** 2
        self.coverage: float | None = None
        self.score: SetScore = "threshold"
        self._quantile = 0.0
        self._extra: list[dict[str, Tensor]] = []
        self._scratch: dict[str, Tensor] = {}
        self._stacked: dict[str, str] = {}
        self._may_fall_back = members == "auto"
        self._check_module()
        fits = bank.nbytes_fp32 <= memory_limit and arithmetic != "integer"
        if members == "stacked" or (members == "auto" and fits):
            self._stack()

    @classmethod
    def from_bank(
        cls,
        module: nn.Module,
        path: str | os.PathLike[str] | SampleBank,
        *,
        refresh_batch_norm: Iterable[Any] | None = None,
        in_memory: bool = True,
        **options: Any,
    ) -> PosteriorEnsemble:
        """Ensemble of the samples of a bank.

        Args:
            module: Built like the one that was sampled.
            path: Path of the bank, or the bank.
            refresh_batch_norm: Training batches with which BatchNorm statistics are measured anew for every member.
            in_memory: Read all codes now. Otherwise streamed members are read from their files at every call.
            **options: Keyword arguments of the class.

        Raises:
            BankError: If there is no bank, or it is of another module.
        """
        bank = path if isinstance(path, SampleBank) else SampleBank.open(path)
        if in_memory and bank.path is not None:
            bank = SampleBank.merged([bank], chains="keep")
        ensemble = cls(module, bank, **options)
        if refresh_batch_norm is not None:
            ensemble.refresh_batch_norm(refresh_batch_norm)
        return ensemble

    # ---------------------------------------------------------------------------------------------------- the members

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def module(self) -> nn.Module:
        """The module whose forward pass the members share."""
        return self.called.module

    @property
    def how(self) -> str:
        """``"stacked"`` or ``"streamed"``."""
        return "stacked" if self._stacked else "streamed"

    def _check_module(self) -> None:
        with swapped_weights(self.module):
            self.bank.load_into(self.module, 0)
        names = {n for n, _ in self.called.named_parameters(remove_duplicate=False)}
        names |= {n for n, _ in self.called.named_buffers(remove_duplicate=False)}
        lost = [name for name in module_tensors(self.module) if f"module.{name}" not in names]
        if lost:
            part = f"`{lost[0]}` is inside a part that torch.compile wrapped"
            raise BankError(f"PosteriorEnsemble: {part}; pass the module as it was before compiling.")

    def _stack(self) -> None:
        values, device = stack(self.bank, self._extra), device_of(self.module)
        self._stacked = {name: f"stacked{number}" for number, name in enumerate(values)}
        for name, key in self._stacked.items():
            self.register_buffer(key, values[name].to(device), persistent=False)

    def _stream(self) -> None:
        for key in self._stacked.values():
            delattr(self, key)
        self._stacked = {}

    def refresh_batch_norm(self, batches: Iterable[Any]) -> int:
        """Measure the BatchNorm statistics of every member anew, by :func:`.refresh_batch_norm`.

        Args:
            batches: Training batches, iterated once per member.

        Returns:
            Number of members refreshed; 0 if the module has no BatchNorm layer.
        """
        self._extra = refreshed_statistics(self.module, self.bank, batches, self.called.rule)
        if self._stacked:
            self._stack()
        return len(self._extra)

    @torch.no_grad()  # while a member computes, not while the caller does
    def outputs(self, batch: Any) -> Generator[Any, None, None]:
        """What each member gives for a batch (logits, values, or pairs), without gradients, in evaluation mode."""
        batch = to_device(batch, device_of(self.module))
        with evaluation_mode(self.called):
            if self._stacked:
                values = {name: getattr(self, key) for name, key in self._stacked.items()}
                yield from stacked_outputs(self.called, values, batch, self.chunk)
            else:
                rest = batch, self._scratch, self.arithmetic
                yield from streamed_outputs(self.called, self.bank, self._extra, *rest)

    # -------------------------------------------------------------------------------------------------- the prediction

    def forward(self, batch: Any) -> Prediction:
        """Prediction for a batch.

        Args:
            batch: Inputs, or a tuple or mapping with inputs (targets are ignored), on any device.

        Returns:
            :class:`.ClassPrediction` or :class:`.RegressionPrediction`, on the module's device.

        Raises:
            ValueError: If the shape of the output does not fit the task.
        """
        exact, dtype = self._exact(batch)
        if self.coverage is not None:
            exact = self._with_sets(exact)
        floats = {n: t.to(dtype) for n, t in exact.tensors().items() if t.is_floating_point()}
        return replace(exact, **floats)

    def _exact(self, batch: Any) -> tuple[Prediction, torch.dtype]:
        """Prediction in float64, and the dtype that it is to be given in."""
        try:
            result = self._reduced(batch)
        except (RuntimeError, ValueError):
            if not (self._stacked and self._may_fall_back):
                raise
            kept, self._stacked = self._stacked, {}
            try:
                result = self._reduced(batch)
            finally:
                self._stacked = kept  # if this failed too, it was not the stacking
            self._stream()
        return result

    def _reduced(self, batch: Any) -> tuple[Prediction, torch.dtype]:
        with closing(self.outputs(batch)) as raw:
            outputs = (open_output(output, self.task) for output in raw)
            head = next(outputs)
            task = task_of(head, self.task)
            first = head if isinstance(head, Tensor) else head.mean
            dtype = torch.promote_types(first.dtype, torch.float32)
            return reduce_outputs(itertools.chain([head], outputs), task, self.noise_variance), dtype

    def _with_sets(self, prediction: Prediction) -> Prediction:
        if isinstance(prediction, ClassPrediction):
            return replace(prediction, sets=prediction_sets(prediction.mean, self._quantile, self.score))
        assert isinstance(prediction, RegressionPrediction)
        reach = self._quantile * prediction.variance.sqrt()
        return replace(prediction, lower=prediction.mean - reach, upper=prediction.mean + reach)

    def calibrate(
        self,
        batches: Iterable[Any],
        *,
        coverage: float = 0.9,
        score: SetScore = "threshold",
        targets: Callable[[Any], Tensor | None] = default_targets,
    ) -> float:
        r"""Choose the size of prediction sets (intervals, for a regression) on held-out data.

        Afterwards predictions carry ``sets`` (or ``lower`` and ``upper``) that hold the truth of a new exchangeable
        point with at least this probability. The data must not have been trained on.

        Args:
            batches: Held-out batches with targets.
            coverage: In (0, 1).
            score: ``"threshold"``: smallest sets on average; ``"adaptive"``: sets grow with the difficulty of the
                point. Classification only.
            targets: ``targets(batch)`` gives the targets.

        Returns:
            The quantile of the scores.

        Raises:
            ValueError: If there are too few points for the coverage, a batch has no targets, or the task has no sets
                (multilabel, or classes per pixel).

        Reference:
            Vovk, Gammerman & Shafer, 2005; Lei et al., 2018, arXiv:1604.04173.
        """
        scores = []
        for batch, truth in with_targets(batches, targets, "PosteriorEnsemble.calibrate", "calibrate"):
            scores.append(self._scores(self._exact(batch)[0], truth.to(device_of(self.module)), score))
        self._quantile = conformal_quantile(torch.cat(scores), coverage)
        self.coverage, self.score = coverage, score
        return self._quantile

    def _scores(self, prediction: Prediction, truth: Tensor, score: SetScore) -> Tensor:
        if isinstance(prediction, RegressionPrediction):
            return interval_scores(prediction.mean, prediction.variance, truth.reshape(prediction.mean.shape))
        if prediction.mean.ndim != 2 or isinstance(self.task, Multilabel):
            raise ValueError(
                "PosteriorEnsemble.calibrate: prediction sets are for one class label a point; outputs per pixel or "
                f"per label (shape {tuple(prediction.mean.shape)}) are not exchangeable points."
            )
        labels = class_indices(truth, self.task)
        check_labels(labels, prediction.mean.shape[1])
        return class_scores(prediction.mean, score).gather(1, labels.long().reshape(-1, 1)).squeeze(1)

    # -------------------------------------------------------------------------------------------------- plain arrays

    def _in_batches(self, inputs: Any, batch_size: int) -> Iterator[Prediction]:
        array = torch.as_tensor(np.asarray(inputs) if not isinstance(inputs, Tensor) else inputs)
        if batch_size < 1 or not len(array):
            raise ValueError(f"PosteriorEnsemble: needs rows and batch_size >= 1, got {len(array)} and {batch_size}.")
        dtypes = [p.dtype for p in self.module.parameters() if p.is_floating_point()]
        if array.is_floating_point() and dtypes:
            array = array.to(dtypes[0])
        for start in range(0, len(array), batch_size):
            yield self(array[start : start + batch_size])

    def predict_proba(self, inputs: Any, batch_size: int = 256) -> np.ndarray[Any, Any]:
        """Mean probabilities of plain arrays, as scikit-learn's classifiers give them.

        Args:
            inputs: Array or tensor, shape ``(n, ...)``; floats are taken to the dtype of the weights.
            batch_size: Rows at once.

        Returns:
            float64 array, shape ``(n, classes)``; rows sum to 1.

        Raises:
            TypeError: If the task is a regression.
        """
        rows = []
        for prediction in self._in_batches(inputs, batch_size):
            if not isinstance(prediction, ClassPrediction):
                raise TypeError("PosteriorEnsemble.predict_proba: a regression has no probabilities; use predict.")
            rows.append(prediction.mean.double().cpu())
        p = torch.cat(rows)
        return (p / p.sum(1, keepdim=True) if not isinstance(self.task, Multilabel) else p).numpy()

    def predict(self, inputs: Any, batch_size: int = 256) -> np.ndarray[Any, Any]:
        """Most probable class of each row, or the mean of a regression.

        Args:
            inputs: As for :meth:`predict_proba`.
            batch_size: Rows at once.

        Returns:
            int64 array of shape ``(n,)`` (multilabel: ``(n, labels)``, 0 or 1), or floats of the output's shape.
        """
        found = []
        for prediction in self._in_batches(inputs, batch_size):
            if not isinstance(prediction, ClassPrediction):
                found.append(prediction.mean.cpu())
            elif isinstance(self.task, Multilabel):
                found.append((prediction.mean > 0.5).long().cpu())
            else:
                found.append(prediction.labels.cpu())
        return torch.cat(found).numpy()

    # -------------------------------------------------------------------------------------------------- saved state

    def get_extra_state(self) -> dict[str, Any]:
        """The samples (codes and exponents), refreshed statistics and calibration, as plain containers and tensors.

        Raises:
            RuntimeError: If the samples are read from a path.
        """
        if self.bank.path is not None:
            raise RuntimeError(
                f"PosteriorEnsemble: members are read from {self.bank.path}; build it with in_memory=True to save it."
            )
        return {
            "bank": self.bank.state_dict(),
            "extra": self._extra,
            "calibration": [self.coverage, self.score, self._quantile],
        }

    def set_extra_state(self, state: Any) -> None:
        """Become the ensemble that was saved."""
        bank = SampleBank()
        bank.load_state_dict(state["bank"])
        self.bank, self._extra = bank, list(state["extra"])
        self.coverage, self.score, self._quantile = state["calibration"]
        if self._stacked:
            self._stack()
