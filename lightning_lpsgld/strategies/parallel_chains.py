"""Independent chains, one per rank or per group of ranks, in one Trainer."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from lightning_lpsgld.random import derive_seed

__all__ = ["ParallelChainsStrategy"]

#: Entry of a checkpoint with what differs between chains; that of chain 0 is the checkpoint itself.
_ENTRY = "parallel_chains"
#: Parts of a checkpoint that are the same for all chains.
_SHARED = ("callbacks", "loops", "epoch", "global_step", "pytorch-lightning_version", "hyper_parameters")


class ParallelChainsStrategy(DDPStrategy):
    """Run K independent chains: ``Trainer(strategy=ParallelChainsStrategy(), devices=K, plugins=[...])``.

    Ranks ``k*r .. (k+1)*r - 1`` are the replicas of chain k, with r = world size / K: each chain is a DDP run of its
    own over r ranks. No gradient leaves a chain. Each chain passes through all training data in an order of its own,
    and its sampler's seed is ``derive_seed(seed, "chain", k)``. A :class:`SampleCollector` gathers the samples of all
    chains in one bank, labelled by chain; a checkpoint holds the state of all chains.

    Every chain starts from the weights that its first rank holds: after ``seed_everything`` they are the same ones.
    Let the module's initial weights depend on the rank where R-hat is to say that chains forgot their start.

    **Where the promise stops.** ``self.log(..., sync_dist=True)`` averages over chains; without it the log shows chain
    0. SVRG, HALP and synchronized BatchNorm communicate over all ranks and are refused.

    Args:
        chains: K, which must divide the number of ranks; ``None``: one chain per rank.
        kwargs: As for ``DDPStrategy``.

    Raises:
        ValueError: If ``chains`` is not an int >= 1; when processes start, if it does not divide their number.

    Example:
        >>> ParallelChainsStrategy(chains=2).chains
        2
    """

    def __init__(self, chains: int | None = None, **kwargs: Any) -> None:
        if chains is not None and (isinstance(chains, bool) or not isinstance(chains, int) or chains < 1):
            raise ValueError(f"ParallelChainsStrategy: `chains` must be None or an int >= 1, got {chains!r}.")
        if "process_group" in kwargs:
            raise ValueError("ParallelChainsStrategy makes the process groups itself; leave `process_group` out.")
        super().__init__(**kwargs)
        self._asked = chains
        self.replica_group: Any = None

    # ------------------------------------------------------------------------------------------------- who is who

    @property
    def chains(self) -> int:
        """Number of chains; before the processes are known, the number asked for, or 1."""
        if self._asked is not None:
            return self._asked
        return self.num_nodes * self.num_processes or 1

    @property
    def replicas(self) -> int:
        """Ranks per chain."""
        return max(1, self.num_nodes * self.num_processes // self.chains)

    @property
    def chain(self) -> int:
        """Number of this rank's chain."""
        return self.global_rank // self.replicas

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of its chain."""
        return self.global_rank % self.replicas == 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Each chain sees all data, in its own order."""
        seed = derive_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)), "chain", self.chain, "data") % 2**31
        return {"num_replicas": self.replicas, "rank": self.global_rank % self.replicas, "seed": seed}

    # ------------------------------------------------------------------------------------------------------ set up

    def setup_distributed(self) -> None:
        """Start the processes' communication, and make a group for each chain."""
        super().setup_distributed()
        world = self.num_nodes * self.num_processes
        if world % self.chains:
            raise ValueError(
                f"ParallelChainsStrategy: {self.chains} chains cannot share {world} ranks evenly. Use a number of "
                "chains that divides `devices * num_nodes`."
            )
        for chain in range(self.chains):  # every rank must take part in making every group
            group = dist.new_group([chain * self.replicas + i for i in range(self.replicas)])
            if chain == self.chain:
                self.replica_group = group

    def setup(self, trainer: pl.Trainer) -> None:
        """As DDP; but evaluating does not copy rank zero's weights over those of the other chains."""
        if self._layer_sync is not None:
            raise ValueError(
                "ParallelChainsStrategy: sync_batchnorm=True would average statistics over chains. Turn it off."
            )
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        assert self.model is not None
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_precision_plugin()

    def _setup_model(self, model: Module) -> DistributedDataParallel:
        self._ddp_kwargs["process_group"] = self.replica_group
        return super()._setup_model(model)

    # ------------------------------------------------------------------------------------------------- between chains

    def gather_objects(self, value: Any, *, to_all: bool) -> list[Any]:
        """Values of all ranks, in their order; a collective call.

        Args:
            value: Anything that can be pickled; it goes only to ranks of this run.
            to_all: Whether every rank gets them; otherwise rank zero does, and the others get an empty list.
        """
        world = dist.get_world_size()
        if to_all:
            everywhere: list[Any] = [None] * world
            dist.all_gather_object(everywhere, value)
            return everywhere
        gathered: list[Any] | None = [None] * world if self.is_global_zero else None
        dist.gather_object(value, gathered, dst=0)
        return gathered or []

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file with the state of all chains; a collective call."""
        own = self.leads and self.chain > 0
        mine = {name: part for name, part in checkpoint.items() if name not in _SHARED} if own else None
        gathered = self.gather_objects(mine, to_all=False)
        if self.is_global_zero:
            checkpoint = {**checkpoint, _ENTRY: [None, *(part for part in gathered if part is not None)]}
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """This chain's part of a checkpoint.

        Raises:
            ValueError: If a fit is to be resumed from a checkpoint of another number of chains.
        """
        checkpoint: dict[str, Any] = dict(super().load_checkpoint(checkpoint_path, *args, **kwargs))
        parts = checkpoint.pop(_ENTRY, [None])
        fitting = self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if len(parts) != self.chains and fitting:
            raise ValueError(
                f"ParallelChainsStrategy: {checkpoint_path} holds {len(parts)} chains, and this run has "
                f"{self.chains}. Resume with `chains={len(parts)}`, or start from the weights alone."
            )
        part = parts[self.chain] if self.chain < len(parts) else None
        return checkpoint if part is None else {**checkpoint, **part}
