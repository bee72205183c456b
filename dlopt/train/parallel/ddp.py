"""ddp: each worker holds everything, and gradients are added up over workers in every step."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.train.loop.gradients import Gradient
from dlopt.train.loop.objectives import Losses, Objective
from dlopt.train.parallel.base import Parallel
from dlopt.train.parallel.exchange import broadcast
from dlopt.train.parallel.reducer import Bucket, Finish, Reducer
from dlopt.train.parallel.shared_memory import Neighbour, meet


class DDP(Parallel):
    """ddp: what worker 0 begins with, all do."""

    def __init__(self, network: nn.Module, rank: int, world: int) -> None:
        super().__init__(network, rank, world)
        broadcast([value for value in network.state_dict().values() if isinstance(value, Tensor)], 0)

    def module(self) -> nn.Module:
        self.neighbour = self._neighbour()
        self.reducer = Reducer(list(self.network.parameters()), self._exchange)
        return self.network

    def partly(self) -> AbstractContextManager[None]:
        return self.reducer.collecting()

    def gradient(self, inner: Gradient) -> Gradient:
        def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
            losses = inner(objective, model, batch)
            self.reducer.finish()
            return losses

        return gradient

    def _neighbour(self) -> Neighbour | None:
        """Where the other one of two workers is on this machine, and neither has a GPU: through what to swap."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if self.world > 2 or parameters[0].device.type != "cpu":
            return None
        return meet(self.rank, sum(parameter.nbytes for parameter in parameters))

    def _exchange(self, bucket: Bucket) -> Finish:
        flat = bucket.flat
        if self.neighbour:
            self.neighbour.add(flat)
            return lambda: None
        if self.world > 2 or flat.device.type != "cpu":
            work = dist.all_reduce(flat, async_op=True)
            assert work is not None
            return work.wait
        return _swapped(flat)


def _swapped(mine: Tensor) -> Finish:
    """The sum of two workers, each of which gets those of the other in one message: the same bits as from a ring, which takes several."""
    both = mine.new_empty(2 * len(mine))
    work = dist.all_gather_into_tensor(both, mine, async_op=True)
    assert work is not None

    def finish() -> None:
        work.wait()
        torch.add(both[: len(mine)], both[len(mine) :], out=mine)

    return finish
