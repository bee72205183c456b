"""ddp: each worker holds everything, and gradients are averaged after every step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.train.loop.gradients import Gradient
from dlopt.train.loop.objectives import Losses, Objective
from dlopt.train.parallel.base import Parallel
from dlopt.train.parallel.exchange import at_once, broadcast


class DDP(Parallel):
    """ddp, whose gradients of a user's network are added up after the way back, all at once. It may leave parameters out of a step, and
    DistributedDataParallel looks for them in what comes out of the network alone, so that it is lost where a penalty reaches them."""

    def __init__(self, network: nn.Module, rank: int, world: int, custom: bool = False) -> None:
        super().__init__(network, rank, world, custom)
        if custom:
            broadcast([value for value in network.state_dict().values() if isinstance(value, Tensor)], 0)

    @property
    def factor(self) -> int:
        return 1 if self.custom else self.world

    def module(self) -> nn.Module:
        return self.network if self.custom else super().module()

    def gradient(self, inner: Gradient) -> Gradient:
        def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
            losses = inner(objective, model, batch)
            at_once(self._gradients(), dist.all_reduce)
            return losses

        return gradient if self.custom else inner

    def _gradients(self) -> list[Tensor]:
        """Of what any worker has used in this step; 0 where this one has not."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=parameters[0].device)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        used = [parameter for parameter, one in zip(parameters, there.tolist(), strict=True) if one]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in used if parameter.grad is not None]
