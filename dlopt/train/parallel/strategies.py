"""Where the numbers of training lie when several workers train one network: one word of a job, and the same curve whichever it is.

| word | weights        | gradients      | optimizer's state | of                                                |
|------|----------------|----------------|-------------------|---------------------------------------------------|
| ddp  | on each worker | on each worker | on each worker    | Li et al. 2020                                    |
| zero | on each worker | on each worker | shared out        | Rajbhandari et al. 2020, its first stage          |
| fsdp | shared out     | shared out     | shared out        | Zhao et al. 2023: a block's weights are gathered  |
|      |                |                |                   | when it is computed, and let go of afterwards     |

Of fsdp each worker writes its rows of a checkpoint, and takes those again that it is to hold; of the others worker 0 writes all. Any
number of workers goes on from what any other has written, whatever the word.

zero is not `fully_shard(reshard_after_forward=False)`, which shares weights out as well and so divides each tensor: optimizers that look
at a whole weight, such as muon, could not have it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from dlopt.optim.optimizers import Optimizer
from dlopt.part import DloptError, Part
from dlopt.train.parallel.base import Parallel
from dlopt.train.parallel.ddp import DDP
from dlopt.train.parallel.fsdp import CPU, FSDP
from dlopt.train.parallel.local_sgd import LocalSGD
from dlopt.train.parallel.zero import Zero

Parallelism = Literal["ddp", "zero", "fsdp"]


def parallel_of(kind: Parallelism, network: nn.Module, rank: int, world: int, custom: bool = False, device: torch.device = CPU) -> Parallel:
    """The network of a job on several workers, or on one. custom: whether it is a user's, of whose parts nothing is known. device: where
    fsdp puts what it shares out; other kinds take the network where it is."""
    if world == 1:
        return Parallel(network)
    return FSDP(network, rank, world, custom, device) if kind == "fsdp" else {"ddp": DDP, "zero": Zero}[kind](network, rank, world)


def refuse_parallelism(kind: Parallelism, optimizer: Optimizer) -> None:
    """Raises DloptError where workers cannot share out the state of an optimizer."""
    if (kind != "ddp" and optimizer.unit == "all") or (kind == "fsdp" and optimizer.unit != "number"):
        instead = "ddp" if optimizer.unit == "all" else "zero or ddp"
        raise DloptError(f"resources.parallelism: {kind} cannot shard the state of optimizer {optimizer.kind}: use {instead}")


def refuse_communication(
    compression: Part | None, synchronization: LocalSGD | None, workers: str | int | tuple[int, int], kind: Parallelism
) -> None:
    """Raises DloptError where workers cannot tell each other what the job wants."""
    if synchronization and workers != synchronization.replicas:
        replicas, asked = synchronization.replicas, list(workers) if isinstance(workers, tuple) else workers
        raise DloptError(f"train.synchronization: its {replicas} replicas need resources.workers: {replicas}, not {asked}")
    for field, given in (("compression", compression), ("synchronization", synchronization)):
        if given and kind != "ddp":
            raise DloptError(f"train.{field}: needs a whole network on each worker: use resources.parallelism: ddp, not {kind}")
