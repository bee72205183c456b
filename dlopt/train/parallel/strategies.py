"""Where the numbers of training lie when several workers train one network: one word of a job, and the same curve whichever it is.

| word | weights        | gradients      | optimizer's state | of                                                |
|------|----------------|----------------|-------------------|---------------------------------------------------|
| ddp  | on each worker | on each worker | on each worker    | Li et al. 2020                                    |
| zero | on each worker | on each worker | shared out        | Rajbhandari et al. 2020, its first stage          |
| fsdp | shared out     | shared out     | shared out        | Zhao et al. 2023: a block's weights are gathered  |
|      |                |                |                   | when it is computed, and let go of afterwards     |

A checkpoint is whole whatever the word: worker 0 gathers it, and each takes its share of it again.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from dlopt.optim.optimizers import Optimizer
from dlopt.part import DloptError, Part
from dlopt.train.parallel.base import Parallel
from dlopt.train.parallel.ddp import DDP
from dlopt.train.parallel.fsdp import FSDP
from dlopt.train.parallel.local_sgd import DiLoCo, LocalSGD
from dlopt.train.parallel.zero import Zero

Parallelism = Literal["ddp", "zero", "fsdp"]


def parallel_of(kind: Parallelism, network: nn.Module, rank: int, world: int, custom: bool = False) -> Parallel:
    """The network of a job on several workers, or on one. custom: whether it is a user's, of whose parts nothing is known."""
    if world == 1:
        return Parallel(network)
    return FSDP(network, rank, world, custom) if kind == "fsdp" else {"ddp": DDP, "zero": Zero}[kind](network, rank, world)


def refuse_parallelism(kind: Parallelism, optimizer: Optimizer) -> None:
    """Raises DloptError where workers cannot share out the state of an optimizer."""
    if (kind != "ddp" and optimizer.unit == "all") or (kind == "fsdp" and optimizer.unit != "number"):
        instead = "ddp" if optimizer.unit == "all" else "zero or ddp"
        raise DloptError(f"resources.parallelism: {kind} cannot shard the state of optimizer {optimizer.kind}: use {instead}")


def refuse_communication(
    compression: Part | None, synchronization: LocalSGD | DiLoCo | None, workers: str | int | tuple[int, int], kind: Parallelism
) -> None:
    """Raises DloptError where workers cannot tell each other what the job wants."""
    if synchronization and workers != synchronization.replicas:
        replicas, found = synchronization.replicas, list(workers) if isinstance(workers, tuple) else workers
        raise DloptError(f"train.synchronization: its {replicas} replicas need resources.workers: {replicas}, not {found}")
    for field, given in (("compression", compression), ("synchronization", synchronization)):
        if given and kind != "ddp":
            raise DloptError(f"train.{field}: needs a whole network on each worker: use resources.parallelism: ddp, not {kind}")
