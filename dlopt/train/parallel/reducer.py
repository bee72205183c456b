"""Gradients of all workers added up, a bucket at a time, beginning while the way back still goes on.

Not torch's DistributedDataParallel, which after the first step puts gradients into other buckets, so that a restart adds three numbers up
in another order than the run that it goes on from; finds what a step does not use by looking at outputs, which misses what a penalty
alone reaches; and to find it at all walks through the graph at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import Parameter

BYTES = 25 << 20
"""Of a bucket, at least, unless it is the last one: enough that what an exchange costs by itself is little beside it."""
Finish = Callable[[], object]
"""Waits until what was begun is done, on the device at least."""


class Bucket:
    """Gradients of some parameters in one tensor, and behind them, of each parameter, how many workers have used it."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters, first = parameters, parameters[0]
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=first.dtype, device=first.device)
        *parts, self.used = self.flat.split([*sizes, len(sizes)])
        self.gradients = [_as(part, parameter) for part, parameter in zip(parts, parameters, strict=True)]
        self.left, self.finish = len(parameters), None

    left: int
    """How many gradients have yet to come."""
    finish: Finish | None
    """Of its exchange, once that has begun."""

    @torch.no_grad()
    def fill(self) -> None:
        """From `.grad` of the parameters; what this worker has not used counts for 0."""
        there = [parameter.grad is not None for parameter in self.parameters]
        self.used.fill_(1)
        if not all(there):
            self.flat.zero_()
            self.used.copy_(torch.tensor(there))
        if any(there):
            mine = [gradient for gradient, one in zip(self.gradients, there, strict=True) if one]
            torch._foreach_copy_(mine, [parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def give(self) -> None:
        """Into `.grad`: of what any worker has used. Who has used all need not look."""
        used = self.used.tolist() if any(parameter.grad is None for parameter in self.parameters) else [1] * len(self.parameters)
        for parameter, gradient, users in zip(self.parameters, self.gradients, used, strict=True):
            if users:
                parameter.grad = gradient


class Reducer:
    """Adds up the gradients of parameters over workers; all of them take the same buckets in the same order."""

    def __init__(self, parameters: Sequence[Parameter], exchange: Callable[[Bucket], Finish]) -> None:
        """exchange: begins to make a bucket the sum over workers, in place."""
        self.exchange, self.partly = exchange, False
        self.buckets = [Bucket(some) for some in bucketed([one for one in reversed(parameters) if one.requires_grad])]
        self.of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        self.begun = 0
        for parameter in self.of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within it, gradients are those of a part of the batch, to which others will be added."""
        self.partly = True
        try:
            yield
        finally:
            self.partly = False

    def finish(self) -> None:
        """After the way back: the sums are in `.grad`."""
        self._begin(all_of_them=True)
        for bucket in self.buckets:
            assert bucket.finish
            bucket.finish()
            bucket.give()
            bucket.left, bucket.finish = len(bucket.parameters), None
        self.begun = 0

    def _arrived(self, parameter: Parameter) -> None:
        if not self.partly:
            self.of[parameter].left -= 1
            self._begin()

    def _begin(self, all_of_them: bool = False) -> None:
        """To exchange those that are complete and whose turn it is."""
        while self.begun < len(self.buckets) and (all_of_them or self.buckets[self.begun].left <= 0):
            bucket = self.buckets[self.begun]
            self.begun += 1
            bucket.fill()
            bucket.finish = self.exchange(bucket)


def bucketed(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Parameters in their order, those of a bucket of one type."""
    for _, some in groupby(parameters, key=lambda parameter: (parameter.dtype, parameter.device)):
        bucket: list[Parameter] = []
        for parameter in some:
            bucket.append(parameter)
            if sum(one.nbytes for one in bucket) >= BYTES:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _as(part: Tensor, parameter: Parameter) -> Tensor:
    """(numbers,) as they lie in memory in the parameter: kernels that walk through both take what lies at the same place."""
    return part.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride(), part.storage_offset())
