"""What workers of one network tell each other other than whole gradients after every step, which changes what comes of a job.

| section                     | kind      | what crosses over                                            | of                    |
|-----------------------------|-----------|--------------------------------------------------------------|-----------------------|
| train.compression           | bfloat16  | gradients in half of the bits                                | Kalamkar et al. 2019  |
|                             | power_sgd | of a matrix two thin ones; what they leave out is sent later | Vogels et al. 2019    |
| train.synchronization       | local_sgd | now and then the weights, whose mean all go on from          | Stich 2019            |

To add one: a class with `build`, and its name in the union of its section.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from dlopt.part import Part
from dlopt.train.parallel.base import Parallel
from dlopt.train.parallel.ddp import DDP
from dlopt.train.parallel.exchange import at_once, collected
from dlopt.train.parallel.reducer import Bucket, Finish

WORTH = 2
"""A matrix goes as two thin ones where they have no more than one in so many of its numbers."""


class Bfloat16(Part):
    """Gradients are sent in bfloat16 and added up so: half of the traffic, and three digits of each number. On one worker nothing is
    sent. The curve depends on the number of workers, within what is rounded off."""

    kind: Literal["bfloat16"] = "bfloat16"

    def build(self, network: nn.Module, rank: int, world: int, seed: int) -> Parallel:
        return Bfloat16Parallel(network, rank, world)


class PowerSGD(Part):
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

    def build(self, network: nn.Module, rank: int, world: int, seed: int) -> Parallel:
        return PowerSGDParallel(network, rank, world, self, seed)


Compression = Annotated[Bfloat16 | PowerSGD, Field(discriminator="kind")]


class Bfloat16Parallel(DDP):
    """ddp whose gradients are sent in bfloat16."""

    def _neighbour(self) -> None:
        return None

    def _exchange(self, bucket: Bucket) -> Finish:
        half = bucket.flat.to(torch.bfloat16)
        work = dist.all_reduce(half, async_op=True)
        assert work is not None

        def finish() -> None:
            work.wait()
            bucket.flat.copy_(half)

        return finish


class Unsent(NamedTuple):
    """What PowerSGD remembers from step to step, by the names of parameters."""

    errors: dict[str, Tensor]
    """Of this worker: the part of a gradient that has not been sent, (rows, columns)."""
    bases: dict[str, Tensor]
    """The same on all workers: where the next power iteration begins, (columns, rank)."""


class PowerSGDParallel(DDP):
    """ddp whose gradients are sent as matrices of low rank.

    torch's own hook remembers by the bucket that a gradient lies in, which is another one after a restart, keeps what is not finite for
    good, and never gets a column back that was 0 once; so this one is written here.
    """

    def __init__(self, network: nn.Module, rank: int, world: int, part: PowerSGD, seed: int) -> None:
        super().__init__(network, rank, world)
        self.part, self.seed, self.step = part, seed, 0
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
        self.unsent = self.before = Unsent({}, {})

    def _neighbour(self) -> None:
        return None

    def begin(self, step: int) -> None:
        self.step, self.before = step, Unsent(dict(self.unsent.errors), dict(self.unsent.bases))

    def undo(self) -> None:
        self.unsent = self.before

    def memory(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        everyones = collected(self.unsent.errors, self.rank, self.world, next(self.network.parameters()).device)
        return {"errors": everyones, "bases": dict(self.unsent.bases)}

    def recall(self, memory: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        device, everyones = next(self.network.parameters()).device, memory.get("errors", [])
        errors = everyones[self.rank] if len(everyones) == self.world else {}
        unsent = Unsent(errors, memory.get("bases", {}))
        self.unsent = Unsent(*({name: value.to(device, copy=True) for name, value in some.items()} for some in unsent))

    @torch.no_grad()
    def _exchange(self, bucket: Bucket) -> Finish:
        """Algorithms 1 and 2 of the paper, for all matrices of a bucket at once; the sum is the mean of what is `world` times as large."""
        if self.step < self.part.start_step:
            return super()._exchange(bucket)
        bucket.flat.mul_(self.world)
        given = list(zip(bucket.parameters, bucket.gradients, strict=True))
        large = {self.names[parameter]: gradient for parameter, gradient in given if self._worth(gradient)}
        rest = [gradient for _, gradient in given if not self._worth(gradient)]
        matrices = {name: self._with_error(name, gradient) for name, gradient in large.items()}
        columns = {name: matrix @ _orthogonal(self._base(name, matrix)) for name, matrix in matrices.items()}
        self._mean([*columns.values(), *rest, bucket.used])
        columns = {name: _orthogonal(column) for name, column in columns.items()}
        bases = {name: matrix.T @ columns[name] for name, matrix in matrices.items()}
        self._mean(list(bases.values()))
        for name, gradient in large.items():
            near = columns[name] @ bases[name].T
            self.unsent.errors[name], self.unsent.bases[name] = matrices[name] - near, bases[name]
            gradient.copy_(near.view(gradient.shape))
        return lambda: None

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
