"""What workers of one network tell each other other than whole gradients after every step, which changes what comes of a job.

| section                     | kind      | what crosses over                                            | of                    |
|-----------------------------|-----------|--------------------------------------------------------------|-----------------------|
| train.compression           | bfloat16  | gradients in half of the bits                                | Kalamkar et al. 2019  |
|                             | power_sgd | of a matrix two thin ones; what they leave out is sent later | Vogels et al. 2019    |
| train.synchronization       | local_sgd | now and then the weights, whose mean all go on from          | Stich 2019            |
|                             | diloco    | the same, and a second optimizer steps from mean to mean     | Douillard et al. 2023 |

To add one: a class with `build`, and its name in the union of its section.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from dlopt.data.feed.batches import Batch
from dlopt.models.norms import BatchNorm
from dlopt.part import DloptError, Part
from dlopt.train.packing import optimizer_state, pack, restore_optimizer, unpack
from dlopt.train.parallel import Parallelism, Replicated, at_once, collected

WORTH = 2
"""A matrix goes as two thin ones where they have no more than one in so many of its numbers."""


class Bfloat16(Part):
    """Gradients are sent in bfloat16 and added up so: half of the traffic, and three digits of each number. On one worker nothing is
    sent. The curve depends on the number of workers, within what is rounded off."""

    kind: Literal["bfloat16"] = "bfloat16"

    def build(self, network: nn.Module, rank: int, world: int, own: bool, seed: int) -> Replicated:
        return Halved(network, rank, world, own)


class PowerSgd(Part):
    """PowerSGD (Vogels, Karimireddy, Jaggi 2019): of each matrix of gradients its nearest of low rank is sent, found by one power
    iteration from that of the step before; each worker adds what it could not send to its next gradient. On one worker nothing is sent.

    The curve depends on the number of workers, within what is left unsent, which is in checkpoints: as many workers go on to the bit,
    another number of them begins anew with nothing unsent.
    """

    kind: Literal["power_sgd"] = "power_sgd"
    rank: int = Field(4, ge=1)
    """Rank of what is sent: the higher, the more of a gradient at once."""
    start_step: int = Field(1000, ge=0)
    """Steps at the start with whole gradients, when those are least alike; a tenth of all is usual."""

    def build(self, network: nn.Module, rank: int, world: int, own: bool, seed: int) -> Replicated:
        return LowRank(network, rank, world, own, self, seed)


Compression = Annotated[Bfloat16 | PowerSgd, Field(discriminator="kind")]


class LocalSgd(Part):
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

    def build(self, network: nn.Module, rank: int, world: int, own: bool, seed: int) -> Replicated:
        return Apart(network, rank, world, own, self.every)


class Diloco(Part):
    """DiLoCo (Douillard et al. 2023): as local_sgd with many more steps, but the mean of the replicas' ways since the last time is taken
    for a gradient, by which SGD with Nesterov momentum steps. The job's optimizer is the inner one, and what it remembers stays with its
    replica. Where the replicas keep going the same way, outer steps are outer_lr / (1 - outer_momentum) times as long, 7 by default: give
    the job's optimizer a lower rate than it would have otherwise."""

    kind: Literal["diloco"] = "diloco"
    replicas: int = Field(ge=2)
    """How many there are; the result depends on it. `resources.workers` must be the same number."""
    every: int = Field(100, ge=1)
    """Steps of an epoch from one outer step to the next; there is always one at its end."""
    outer_lr: float = Field(0.7, gt=0)
    """Rate of the outer steps: 1 without momentum goes to the mean."""
    outer_momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the last outer step that goes on in this one."""

    def build(self, network: nn.Module, rank: int, world: int, own: bool, seed: int) -> Replicated:
        return Outer(network, rank, world, own, self)


Synchronization = Annotated[LocalSgd | Diloco, Field(discriminator="kind")]


def refuse_communication(
    compression: Part | None, synchronization: LocalSgd | Diloco | None, workers: str | int | tuple[int, int], kind: Parallelism
) -> None:
    """Raises DloptError where workers cannot tell each other what the job wants."""
    if synchronization and workers != synchronization.replicas:
        replicas, found = synchronization.replicas, list(workers) if isinstance(workers, tuple) else workers
        raise DloptError(f"train.synchronization: its {replicas} replicas need resources.workers: {replicas}, not {found}")
    for field, given in (("compression", compression), ("synchronization", synchronization)):
        if given and kind != "ddp":
            raise DloptError(f"train.{field}: needs a whole network on each worker: use resources.parallelism: ddp, not {kind}")


class Halved(Replicated):
    """ddp whose gradients are sent in bfloat16."""

    exchanged = False

    def module(self) -> nn.Module:
        found = super().module()
        assert isinstance(found, DistributedDataParallel)
        found.register_comm_hook(dist.group.WORLD, lambda group, bucket: bf16_compress_hook(group, bucket))  # by name, torch wants NCCL
        return found


class Unsent(NamedTuple):
    """What PowerSGD remembers from step to step, by the names of parameters."""

    errors: dict[str, Tensor]
    """Of this worker: the part of a gradient that has not been sent, (rows, columns)."""
    bases: dict[str, Tensor]
    """The same on all workers: where the next power iteration begins, (columns, rank)."""


class LowRank(Replicated):
    """ddp whose gradients are sent as matrices of low rank.

    torch's own hook remembers by the bucket that a gradient lies in, which is another one after a restart, keeps what is not finite for
    good, and never gets a column back that was 0 once; so this one is written here.
    """

    exchanged = False

    def __init__(self, network: nn.Module, rank: int, world: int, own: bool, part: PowerSgd, seed: int) -> None:
        super().__init__(network, rank, world, own)
        self.part, self.seed, self.step = part, seed, 0
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
        self.unsent = self.before = Unsent({}, {})

    def module(self) -> nn.Module:
        found = super().module()
        assert isinstance(found, DistributedDataParallel)
        found.register_comm_hook(None, lambda state, bucket: self._sent(bucket))
        return found

    def begin(self, step: int) -> None:
        self.step, self.before = step, Unsent(dict(self.unsent.errors), dict(self.unsent.bases))

    def undo(self) -> None:
        self.unsent = self.before

    def memory(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        everyones = collected(self.unsent.errors, self.rank, self.world, next(self.network.parameters()).device)
        errors = {f"worker.{rank}.{name}": error for rank, found in enumerate(everyones) for name, error in found.items()}
        return {f"exchange.{name}": base for name, base in self.unsent.bases.items()} | errors

    def recall(self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        device = next(self.network.parameters()).device
        there = {name.split(".")[1] for name in tensors if name.startswith("worker.")}
        errors = _under(f"worker.{self.rank}.", tensors) if len(there) == self.world else {}
        found = Unsent(errors, _under("exchange.", tensors))
        self.unsent = Unsent(*({name: value.to(device, copy=True) for name, value in some.items()} for some in found))

    @torch.no_grad()
    def _sent(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Algorithms 1 and 2 of the paper, for all matrices of a bucket at once."""
        if self.step < self.part.start_step:
            return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]
        given = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        large = {self.names[parameter]: gradient for parameter, gradient in given if self._worth(gradient)}
        rest = [gradient for _, gradient in given if not self._worth(gradient)]
        matrices = {name: self._with_error(name, gradient) for name, gradient in large.items()}
        columns = {name: matrix @ _orthogonal(self._base(name, matrix)) for name, matrix in matrices.items()}
        self._mean([*columns.values(), *rest])
        columns = {name: _orthogonal(column) for name, column in columns.items()}
        bases = {name: matrix.T @ columns[name] for name, matrix in matrices.items()}
        self._mean(list(bases.values()))
        for name, gradient in large.items():
            near = columns[name] @ bases[name].T
            self.unsent.errors[name], self.unsent.bases[name] = matrices[name] - near, bases[name]
            gradient.copy_(near.view(gradient.shape))
        done: Future[Tensor] = Future()
        done.set_result(bucket.buffer())
        return done

    def _worth(self, gradient: Tensor) -> bool:
        if gradient.dim() < 2:
            return False
        rows, columns = len(gradient), gradient[0].numel()
        return WORTH * (rows + columns) * min(rows, columns, self.part.rank) <= rows * columns

    def _with_error(self, name: str, gradient: Tensor) -> Tensor:
        matrix = gradient.flatten(1)
        return matrix + self.unsent.errors[name] if name in self.unsent.errors else matrix.clone()

    def _base(self, name: str, matrix: Tensor) -> Tensor:
        """Of the step before; the first one is of random numbers that follow from the job's seed and the parameter's name."""
        if name in self.unsent.bases:
            return self.unsent.bases[name]
        generator = torch.Generator().manual_seed(self.seed + list(self.names.values()).index(name))
        shape = matrix.shape[1], min(*matrix.shape, self.part.rank)
        return torch.randn(shape, generator=generator, dtype=matrix.dtype).to(matrix.device)

    def _mean(self, tensors: list[Tensor]) -> None:
        at_once(tensors, lambda flat: dist.all_reduce(flat.div_(self.world)))


def _orthogonal(columns: Tensor) -> Tensor:
    """Orthonormal ones that span the same; what is 0 becomes some other direction."""
    return torch.linalg.qr(columns).Q


class Apart(Replicated):
    """Replicas that go their own way, until they synchronise: all go on from their mean then."""

    def __init__(self, network: nn.Module, rank: int, world: int, own: bool, every: int) -> None:
        super().__init__(network, rank, world, own)
        self.every, self.start = every, dict[str, Tensor]()
        for layer in network.modules():
            if isinstance(layer, BatchNorm):
                layer.alone = True
        from_worker_0 = list(self._moving().values())
        at_once(from_worker_0, lambda flat: dist.broadcast(flat, 0))

    @property
    def factor(self) -> int:
        return 1

    @property
    def copies(self) -> int:
        return 1

    @property
    def together(self) -> int:
        return 1

    def module(self) -> nn.Module:
        return self.network

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The mean over a batch is that over this replica's rows."""
        for batch in batches:
            yield batch._replace(total=max(1, len(batch.target)))

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
            value.copy_(start[name] + self._outer(name, way))
        self._settle(optimizer, share)

    def _outer(self, name: str, way: Tensor) -> Tensor:
        """From the mean way of all replicas since the last time, the one that all go."""
        return way

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

    def memory(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Of the optimizers of all replicas, what is not as that of the first."""
        tensors, rest = pack(optimizer_state(optimizer))
        mine = {f"optimizer.{name}": value for name, value in tensors.items()}
        mine["rest"] = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
        first, *others = collected(mine, self.rank, self.world, next(self.network.parameters()).device) or [{}]
        return {
            f"worker.{rank}.{name}": value
            for rank, found in enumerate(others, start=1)
            for name, value in found.items()
            if name == "rest" or name not in first or not torch.equal(value, first[name])
        }

    def recall(self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.start = {}
        mine = _under(f"worker.{self.rank}.", tensors)
        if mine:
            rest = json.loads(bytes(mine["rest"].tolist()))
            restore_optimizer(optimizer, unpack(_under("optimizer.", tensors) | _under("optimizer.", mine), rest))

    def _moving(self) -> dict[str, Tensor]:
        """All of the network that can change in a step, by name."""
        frozen = {name for name, parameter in self.network.named_parameters() if not parameter.requires_grad}
        return {name: value for name, value in self.network.state_dict().items() if value.is_floating_point() and name not in frozen}


class Outer(Apart):
    """Replicas that synchronise by a step of SGD with Nesterov momentum."""

    def __init__(self, network: nn.Module, rank: int, world: int, own: bool, part: Diloco) -> None:
        super().__init__(network, rank, world, own, part.every)
        self.part = part
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}

    def _outer(self, name: str, way: Tensor) -> Tensor:
        """As torch.optim.SGD(nesterov=True) for the gradient -way; statistics of batch normalization go to their mean."""
        if name not in self.momentum:
            return way
        lr, momentum = self.part.outer_lr, self.part.outer_momentum
        self.momentum[name].mul_(momentum).add_(way)
        return lr * (way + momentum * self.momentum[name])

    def _settle(self, optimizer: torch.optim.Optimizer, share: float) -> None:
        pass

    def memory(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        return super().memory(optimizer) | {f"exchange.{name}": value for name, value in self.momentum.items()}

    def recall(self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        super().recall(tensors, optimizer)
        for name, value in _under("exchange.", tensors).items():
            self.momentum[name].copy_(value)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
