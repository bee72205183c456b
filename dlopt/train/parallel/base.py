"""What every way to train on several workers can be asked; and the plain one, of which each worker holds everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from dlopt.data.feed.batches import Batch
from dlopt.optim.constraints import total_norm
from dlopt.train.loop.gradients import Gradient
from dlopt.train.parallel.shared_memory import Neighbour, meet

Groups = list[dict[str, Any]]
OptimizerState = dict[str, Any]
"""What an optimizer's `state_dict` gives."""


class Parallel:
    """ddp: each worker holds everything. Of one worker it is the plain network."""

    exchanged = True
    """Whether gradients are added up as they are."""

    def __init__(self, network: nn.Module, rank: int = 0, world: int = 1, custom: bool = False) -> None:
        """custom: whether the network is a user's, of whose parts nothing is known."""
        self.network, self.rank, self.world, self.custom = network, rank, world, custom
        self.held: nn.Module = network
        """Its parameters, by the names of the network's, and its state are what this worker holds."""

    @property
    def factor(self) -> int:
        """What a worker's part of the loss is multiplied with for the way back, so that gradients are those of the sum of all parts."""
        return self.world

    @property
    def copies(self) -> int:
        """How many workers hold each weight."""
        return self.world

    @property
    def writes(self) -> bool:
        """Whether this worker has a part in what is written: of what all hold alike worker 0 alone has."""
        return self.rank == 0

    @property
    def together(self) -> int:
        """How many workers compute each batch together, so that they exchange something at each step."""
        return self.world

    def module(self) -> nn.Module:
        """What is called in training. A user's network may leave parameters out of a step, which takes time to find.

        It is looked for with more than two workers, too: only then gradients lie in the same buckets at the first step after a restart as
        later, and on where they lie depends in which order three numbers are added up.
        """
        if self.world == 1:
            return self.network
        seek = self.custom or self.world > 2
        found = DistributedDataParallel(self.network, gradient_as_bucket_view=True, broadcast_buffers=False, find_unused_parameters=seek)
        if self.exchanged and self.world == 2 and next(self.network.parameters()).device.type == "cpu":
            size = sum(parameter.nbytes for parameter in self.network.parameters() if parameter.requires_grad)
            other = meet(self.rank, size)
            found.register_comm_hook(other, lambda other, bucket: _averaged(bucket, other))  # torch wants no annotations that are words
        return found

    def groups(self, groups: Groups) -> Groups:
        """Groups of the network's parameters, as the optimizer is given them."""
        return groups

    def optimizer(self, built: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer that was built for these groups, as training steps it."""
        return built

    def gradient(self, inner: Gradient) -> Gradient:
        """A gradient function that leaves gradients in the parameters of `held`."""
        return inner

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """This worker's shares of batches, as the objective is given them."""
        return batches

    def begin(self, step: int) -> None:
        """A step begins, before which there were `step`."""

    def undo(self) -> None:
        """The step that was begun is left out."""

    def memory(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """On worker 0, what a checkpoint must have beside the state of one worker; on others, anything. All call it at once. Names begin
        with `exchange`, or with `worker` and its rank."""
        return {}

    def recall(self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Go on from a checkpoint with these tensors, whose weights and optimizer's state have been restored."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The 2-norm of the whole gradient, the same on all workers. gradients: those of this worker's parameters."""
        return self.norms(total_norm(gradients))

    def norms(self, held: Tensor) -> Tensor:
        """2-norms of what lies on all workers, of those of what this one holds."""
        return held

    def share(self, parameter: Parameter) -> Parameter:
        """What this worker holds of a parameter of the network."""
        return parameter

    def all(self, here: bool) -> bool:
        """Whether it is so on all workers, of which each knows about what it holds."""
        return here

    def alike(self) -> dict[str, Tensor]:
        """What must be the same on all workers."""
        return self.held.state_dict()

    def whole(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On worker 0, what all workers hold by the names of the network's state; on others, anything. All call it at once."""
        return dict(held)

    def mine(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this worker holds of it."""
        return dict(whole)

    @torch.no_grad()
    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Make these the network's weights and buffers."""
        mine = self.mine(whole)
        for name, value in self.held.state_dict().items():
            value.copy_(mine[name])

    def whole_state(self, held: OptimizerState) -> OptimizerState:
        """On worker 0, the state of the optimizer of one worker; on others, anything. All call it at once."""
        return held

    def my_state(self, whole: OptimizerState) -> OptimizerState:
        """What this worker holds of it."""
        return whole

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it, each worker can call the network, without gradients, as often as it likes."""
        yield

    def alone(self, build: Callable[[], nn.Module]) -> nn.Module:
        """A network that one worker can call without the others, its weights anything. build: makes one."""
        return self.network


def _averaged(bucket: dist.GradBucket, other: Neighbour | None) -> Future[Tensor]:
    """The mean of the gradients of two workers, through memory where they are neighbours. Elsewhere each gets those of the other in one
    message: the same bits as from a ring, which takes several."""
    mine = bucket.buffer()
    if other:
        other.average(mine)
        done = Future[Tensor]()
        done.set_result(mine)
        return done
    both = mine.new_empty(2 * len(mine))
    work = dist.all_gather_into_tensor(both, mine, async_op=True)
    assert work is not None

    def mean(_: Future[list[Tensor]]) -> Tensor:
        return torch.add(both[: len(mine)], both[len(mine) :], out=mine).mul_(0.5)

    return work.get_future().then(mean)
