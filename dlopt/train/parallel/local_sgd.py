"""Replicas that train for themselves and meet now and then. For links too slow for gradients at every step.

DiLoCo (Douillard et al. 2023), whose second optimizer steps from mean to mean, was here; nothing measured said for it, so it went."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.models.norms import BatchNorm
from dlopt.part import Part
from dlopt.train.checkpoint.packing import optimizer_state, pack, restore_optimizer, unpack
from dlopt.train.parallel.base import Parallel
from dlopt.train.parallel.exchange import at_once, collected


class LocalSGD(Part):
    """Local SGD (Stich 2019): each replica steps by the mean gradient of its own rows, and every so often all go on from the mean of
    their weights, of the statistics of batch normalization, and of the optimizer's averages that have a weight's shape, such as momentum
    (Yu, Jin, Yang 2019). Replicas count by the rows they have seen since the last time (McMahan et al. 2017).

    Between two means nothing is exchanged: batch normalization, clipping and steps that are left out are a replica's own, and
    checkpoints, and the end of training when it is asked for, wait for the next one. Averages of the weights take those of a mean for
    those of all steps that led there. The log's losses are of all replicas; its norms, and what is said of layers, of the first one.
    """

    kind: Literal["local_sgd"] = "local_sgd"
    replicas: int = Field(ge=2)
    """How many there are; the result depends on it. `resources.workers` must be the same number."""
    every: int = Field(8, ge=1)
    """Steps of an epoch from one mean to the next; there is always one at its end."""

    def build(self, network: nn.Module, rank: int, world: int, seed: int) -> Parallel:
        return LocalSGDParallel(network, rank, world, self.every)


class LocalSGDParallel(Parallel):
    """Replicas that go their own way, until they synchronise: all go on from their mean then."""

    def __init__(self, network: nn.Module, rank: int, world: int, every: int) -> None:
        super().__init__(network, rank, world)
        self.every, self.start = every, dict[str, Tensor]()
        for layer in network.modules():
            if isinstance(layer, BatchNorm):
                layer.alone = True
        from_worker_0 = list(self._moving().values())
        at_once(from_worker_0, lambda flat: dist.broadcast(flat, 0))

    @property
    def copies(self) -> int:
        return 1

    @property
    def together(self) -> int:
        return 1

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The mean over a batch is that over this replica's rows."""
        for batch in batches:
            yield batch._replace(total=max(1, len(batch.target)), most=0)

    def due(self, batch: int, batches: int) -> bool:
        """Whether replicas synchronise after batch number `batch`, from 1, of an epoch of `batches`."""
        return batch % self.every == 0 or batch == batches

    def begin(self, step: int) -> None:
        if not self.start:
            self.start = {name: value.clone() for name, value in self._moving().items()}

    @torch.no_grad()
    def synchronise(self, optimizer: torch.optim.Optimizer, share: float) -> None:
        """share: of the rows since the last time that were this replica's."""
        moving, self.start, start = self._moving(), {}, self.start
        ways = [value - start[name] for name, value in moving.items()]
        at_once(ways, lambda flat: dist.all_reduce(flat.mul_(share)))
        for (name, value), way in zip(moving.items(), ways, strict=True):
            value.copy_(start[name] + way)
        self._settle(optimizer, share)

    def _settle(self, optimizer: torch.optim.Optimizer, share: float) -> None:
        """What becomes of the optimizer's averages: their mean, once all replicas have any."""
        averages = [
            value
            for parameter in self.network.parameters()
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
        ]
        counts = torch.tensor([len(averages), -len(averages)], device=next(self.network.parameters()).device)
        dist.all_reduce(counts, dist.ReduceOp.MIN)
        if int(counts.sum()) == 0:
            at_once(averages, lambda flat: dist.all_reduce(flat.mul_(share)))

    def memory(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Of the optimizers of all replicas, what is not as that of the first."""
        tensors, rest = pack(optimizer_state(optimizer))
        rests: list[Any] = [None] * self.world
        dist.all_gather_object(rests, rest)
        first, *others = collected(tensors, self.rank, self.world, next(self.network.parameters()).device) or [{}]
        return {
            "replicas": {
                rank: {
                    "rest": json.dumps(rests[rank]),
                    "tensors": {key: value for key, value in its.items() if key not in first or not torch.equal(value, first[key])},
                }
                for rank, its in enumerate(others, start=1)
            }
        }

    def recall(self, memory: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        self.start = {}
        if mine := memory.get("replicas", {}).get(self.rank):
            first, _ = pack(optimizer_state(optimizer))  # which every replica has been given
            restore_optimizer(optimizer, unpack(first | mine["tensors"], json.loads(mine["rest"])))

    def _moving(self) -> dict[str, Tensor]:
        """All of the network that can change in a step, by name."""
        frozen = {name for name, parameter in self.network.named_parameters() if not parameter.requires_grad}
        return {name: value for name, value in self.network.state_dict().items() if value.is_floating_point() and name not in frozen}
